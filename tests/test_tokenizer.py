"""Words, byte-pair encoding and vocabularies against brute force, regex, tiktoken, tokenizers."""

import json
import pickle
import random
import time
import unicodedata
from collections import Counter
from pathlib import Path

from llmfs.data.words import (
    GPT2_PATTERN,
    KINDS,
    WordTable,
    count_words,
    cut_stream,
    document_blocks,
    find_words,
    mark_stops,
)
from llmfs.tokenizer.bpe import (
    BPE,
    WordIds,
    encode_array,
    encode_batch,
    find_merges,
    learn_merges,
    merge_by_rank,
    merge_long,
    train_bpe,
)
from llmfs.tokenizer.vocab import (
    CharTokenizer,
    Tokenizer,
    from_gpt2_files,
    from_tiktoken,
    load_tokenizer,
    to_tokenizer_json,
    train_tokenizer,
)

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
GPT2 = ROOT.parent / "shared" / "data" / "gpt2"
EOT = "<|endoftext|>"
AWKWARD = (
    list("abstmdrevl'''   \n\r\t\v\x1c\x1f\0\x7f\x85\xa0.,!?-_0123½²١")
    + ["n't", "'ll", "'re", "'S", "\r\n", "\u200d", "\u2028", "\u3000", "\u0301", "ß", "Ǆ"]
    + ["é", "ж", "你", "好", "ไท", "ी", "한", "🙂", "👩‍👩‍👧", "\ufffd", "\ufeff", "𝔘", "٣", EOT, "<|endo"]
)
PROSE = (
    "The old man couldn't sell his bread; they'd told him: 'It's 3.14 a loaf!' \n\n"
    "def f(x):\n    return x ** 2  # naïve café\n\tПривет, мир. 你好，世界。 नमस्ते दुनिया 🙂🙂 \n"
)


def text_of(rng, n=40):
    "A random string: awkward pieces, prose, any character."
    out = []
    for _ in range(rng.randint(0, n)):
        kind = rng.random()
        if kind < 0.7:
            out.append(rng.choice(AWKWARD))
        elif kind < 0.85:
            i = rng.randrange(len(PROSE))
            out.append(PROSE[i : i + rng.randint(1, 12)])
        else:
            code = rng.randrange(0x110000)
            out.append(chr(code) if not 0xD800 <= code < 0xE000 else "x")
    return "".join(out)


def words(text):
    data, starts = find_words(text)
    return [data[a:b].decode("utf-8", "surrogatepass") for a, b in zip(starts, starts[1:])]


def fresh_seeds(n):
    first = time.time_ns() % 10**9
    print("first seed", first)
    return range(first, first + n)


# --- words -----------------------------------------------------------------


def known_to(regex):
    "Characters whose kind in the regex module is ours: not those of a newer Unicode."
    text = "".join(chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000)
    kinds = np.zeros(0x110000, np.uint8)
    for kind, pattern in enumerate([r"\p{L}+", r"\p{N}+", r"\s+"], 1):
        for run in regex.finditer(pattern, text):
            kinds[[ord(c) for c in run[0]]] = kind
    same = kinds == KINDS
    same[0xD800:0xE000] = False
    return same


def test_kinds_are_those_of_the_regex_module():
    regex = pytest.importorskip("regex")
    same = known_to(regex)
    differ = [i for i in np.flatnonzero(~same) if not 0xD800 <= i < 0xE000]
    # the only differences: characters that a later Unicode than 16.0 assigned
    assert all(KINDS[i] == 0 for i in differ)
    assert all(
        unicodedata.category(chr(i)) == "Cn" or unicodedata.unidata_version > "16" for i in differ
    )
    assert not any(i < 0x500 for i in differ)


@pytest.mark.parametrize("form", ["c", "ac'sb", "1c2 c."])
def test_every_code_point_is_cut_like_regex(form):
    regex = pytest.importorskip("regex")
    gpt2 = regex.compile(GPT2_PATTERN)
    points = np.flatnonzero(known_to(regex))
    for i in range(0, len(points), 100_000):
        text = "".join(form.replace("c", chr(p)) for p in points[i : i + 100_000])
        assert words(text) == gpt2.findall(text)


def check_words(seed, regex, same):
    rng = random.Random(seed)
    text = "".join(c for c in text_of(rng) if same[ord(c)])
    assert words(text) == regex.findall(GPT2_PATTERN, text), seed


def test_strings_are_cut_like_regex():
    regex = pytest.importorskip("regex")
    same = known_to(regex)
    for seed in range(1000):
        check_words(seed, regex, same)


def test_stops_separate_and_the_longest_wins():
    special = ["<|a|>", "<|a|><|b|>", "<|b|>"]
    assert words(mark_stops("x <|a|><|b|>  <|b|>y", special)) == [
        "x", " ", "\ud801", "  ", "\ud802", "y"]  # fmt: skip
    assert mark_stops("a\ud83d\ude00b\ud83dc") == "a😀b\ufffdc"
    assert words(mark_stops("\ud800", [])) == ["\ufffd"]


def test_cut_stream_never_cuts_a_word():
    for seed in range(200):
        rng = random.Random(seed)
        text = text_of(rng, 80)
        pieces, i = [], 0
        while i < len(text):
            n = rng.randint(1, 30)
            pieces.append(text[i : i + n])
            i += n
        blocks = list(cut_stream(pieces, size=rng.randint(1, 40)))
        assert "".join(blocks) == text
        assert sum(map(words, blocks), []) == words(text)


@pytest.mark.parametrize("bits", [1, 4, 18])
def test_word_table_is_a_dictionary(bits):
    rng, table, right = random.Random(1), WordTable(bits), {}
    for _ in range(100):
        found = [bytes(rng.choices(b"\0ab\xff", k=rng.randint(1, 20))) for _ in range(50)]
        starts = np.cumsum([0] + [len(w) for w in found])
        numbers = table(b"".join(found), starts)
        assert numbers.tolist() == [right.setdefault(w, len(right)) for w in found]


def test_counts_from_strings_files_and_processes(tmp_path):
    documents = [text_of(random.Random(i)) for i in range(300)]
    expected = Counter(
        w.encode() for d in documents for part in d.split(EOT) for w in words(part)
    )
    assert count_words(documents, [EOT]) == expected
    assert count_words(iter(documents), [EOT], processes=2) == expected
    path = tmp_path / "a b.txt"
    path.write_text(EOT.join(documents), encoding="utf-8", newline="")
    assert count_words(path, [EOT]) == expected
    assert count_words([path, path], [EOT]) == expected + expected
    assert list(document_blocks([])) == [] and count_words([]) == {}


# --- training --------------------------------------------------------------


def brute_force(counts, n_merges, min_count=2):
    split = {w: [bytes([b]) for b in w] for w in counts}
    merges = []
    while len(merges) < n_merges:
        pairs = Counter()
        for w, n in counts.items():
            for pair in zip(split[w], split[w][1:]):
                pairs[pair] += n
        if not pairs or max(pairs.values()) < min_count:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        for w, s in split.items():
            i, out = 0, []
            while i < len(s):
                step = 2 if tuple(s[i : i + 2]) == best else 1
                out.append(b"".join(s[i : i + step]))
                i += step
            split[w] = out
        merges.append(best)
    return merges, split


def random_counts(rng):
    letters = b"\0ab\xffcd"[: rng.randint(1, 6)]
    return {
        bytes(rng.choices(letters, k=rng.randint(1, 20))): rng.randint(1, 5)
        for _ in range(rng.randint(1, 20))
    }


def check_training(seed):
    rng = random.Random(seed)
    counts, min_count = random_counts(rng), rng.randint(1, 3)
    merges, split = brute_force(counts, 40, min_count)
    assert learn_merges(counts, 40, min_count) == merges, seed
    assert len({x + y for x, y in merges}) == len(merges), seed
    ranks = BPE(merges).ranks
    back = {i: t for t, i in ranks.items()}
    for word, tokens in split.items():
        assert [back[i] for i in merge_by_rank(word, ranks)] == tokens, seed
        assert [back[i] for i in merge_long(word, ranks)] == tokens, seed
    assert find_merges(ranks) == merges, seed


def test_merges_are_those_of_brute_force():
    for seed in range(300):
        check_training(seed)


def test_merges_are_those_of_tokenizers_where_nothing_ties():
    tokenizers = pytest.importorskip("tokenizers")
    rng, counts = random.Random(5), {}
    for _ in range(60):
        counts[bytes(rng.choices(b"abcde", k=rng.randint(2, 9)))] = rng.randrange(100, 2000)
    texts = (w.decode() for w, n in counts.items() for _ in range(n))
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=45, show_progress=False)
    theirs.train_from_iterator(texts, trainer)
    merges = json.loads(theirs.to_str())["model"]["merges"]
    ours = [[x.decode(), y.decode()] for x, y in learn_merges(counts, 25)]
    assert len(merges) == 40 and ours == merges[:25]  # the first tie comes later


def test_training_respects_documents_words_and_special_tokens():
    merges = train_bpe(["ab" * 1, "ab", f"ba{EOT}ba", "b a b a"], 300)
    joined = {x + y for x, y in merges}
    assert joined <= {b"ab", b"ba", b" a", b" b"}
    assert train_bpe(f"x{EOT}x{EOT}x", 400) == []
    with pytest.raises(ValueError, match="choose at least 257"):
        train_bpe("abc", 256)


def test_training_is_deterministic():
    documents = [text_of(random.Random(i)) for i in range(200)]
    merges = train_bpe(documents, 400)
    assert merges == train_bpe(documents[::-1], 400)
    assert merges == train_bpe(documents, 400, processes=2)


HARD = {
    "letter": lambda n: "a" * n,
    "no space": lambda n: "".join(random.Random(0).choices("abcdefghijklmnop", k=n)),
    "emoji": lambda n: "😀🙃" * (n // 8),
    "nul": lambda n: "\0" * n,
    "spaces": lambda n: " " * n,
    "lines": lambda n: "\n \n" * (n // 3),
    "apostrophes": lambda n: "'s" * (n // 2),
}


def check_hard(text, seconds):
    start = time.perf_counter()
    tokenizer = train_tokenizer(text, 600)
    ids = tokenizer.encode_array(text)
    assert time.perf_counter() - start < seconds
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("name", HARD)
def test_hard_texts_take_seconds(name):
    check_hard(HARD[name](200_000), 20)


# --- encoding --------------------------------------------------------------


@pytest.fixture(scope="module")
def small():
    return train_tokenizer([PROSE, PROSE * 2, *AWKWARD * 2], 600)


@pytest.fixture(scope="module")
def gpt2():
    if not (GPT2 / "encoder.json").is_file():
        pytest.skip("GPT-2's files are not in ../shared/data")
    return from_gpt2_files(GPT2)


def tiktoken_of(tokenizer):
    tiktoken = pytest.importorskip("tiktoken")
    return tiktoken.Encoding(
        "test",
        pat_str=tokenizer.pattern,
        mergeable_ranks=tokenizer.bpe.ranks,
        special_tokens=tokenizer.special_tokens,
    )


def check_like_tiktoken(seed, tokenizer, tik):
    text = text_of(random.Random(seed))
    if seed % 7 == 0:
        text += "\ud83d" + text[:3] + "\ud83d\ude00"
    ids = tokenizer.encode(text)
    assert ids == tik.encode_ordinary(text), seed
    assert tokenizer.encode(text, allow_special=True) == tik.encode(text, allowed_special="all")
    clean = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert tokenizer.decode(ids) == clean, seed


def test_ids_are_tiktokens(small):
    tik = tiktoken_of(small)
    for seed in range(300):
        check_like_tiktoken(seed, small, tik)


def test_ids_are_tiktokens_with_gpt2(gpt2):
    tik = tiktoken_of(gpt2)
    for seed in range(300):
        check_like_tiktoken(seed, gpt2, tik)
    points = [chr(i) for i in range(0, 0x110000, 23) if not 0xD800 <= i < 0xE000]
    for form in ("c", "acb", " c1"):
        text = "\n".join(form.replace("c", c) for c in points)
        assert gpt2.encode(text) == tik.encode_ordinary(text)
    for text in ("a" * 3000, "ab " * 1000, "\u3042" * 2000, PROSE * 20):
        assert gpt2.encode(text) == tik.encode_ordinary(text)


def test_gpt2_merges_are_those_in_its_file(gpt2):
    from llmfs.tokenizer.vocab import show_bytes

    lines = (GPT2 / "vocab.bpe").read_text(encoding="utf-8").split("\n")[1:-1]
    assert [f"{show_bytes(x)} {show_bytes(y)}" for x, y in find_merges(gpt2.bpe.ranks)] == lines
    assert gpt2.vocab_size == 50257 and gpt2.eot_id == 50256
    assert gpt2.encode("Hello, world!") == [15496, 11, 995, 0]


def assigned(text):
    "Without characters that are newer than this Python: libraries differ on those."
    return "".join(c for c in text if unicodedata.category(c) not in ("Cn", "Cs"))


def check_like_tokenizers(seed, tokenizer, theirs):
    text = assigned(text_of(random.Random(seed)))
    ids = tokenizer.encode(text, allow_special=True)
    assert theirs.encode(text).ids == ids, seed
    assert theirs.decode(ids, skip_special_tokens=False) == text, seed


def test_tokenizer_json_encodes_identically(small):
    tokenizers = pytest.importorskip("tokenizers")
    theirs = tokenizers.Tokenizer.from_str(json.dumps(to_tokenizer_json(small)))
    assert theirs.get_vocab_size() == small.vocab_size
    for seed in range(300):
        check_like_tokenizers(seed, small, theirs)


def test_tokenizer_json_of_another_pattern_and_ids():
    tokenizers = pytest.importorskip("tokenizers")
    pytest.importorskip("regex")
    pattern = r"\p{N}{1,3}| ?\p{L}+|[^\p{L}\p{N}]"
    ranks = BPE(train_bpe(PROSE * 3, 400)).ranks
    tokenizer = Tokenizer(ranks, {"<|pad|>": 1000, EOT: 998}, pattern)
    assert tokenizer.vocab_size == 1001
    theirs = tokenizers.Tokenizer.from_str(json.dumps(to_tokenizer_json(tokenizer)))
    tik = tiktoken_of(tokenizer)
    for seed in range(100):
        text = assigned(text_of(random.Random(seed)))
        ids = tokenizer.encode(text, allow_special=True)
        assert ids == tik.encode(text, allowed_special="all") == theirs.encode(text).ids
        assert tokenizer.decode(ids) == text
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.encode("12345 a") == tokenizer.encode("12345 a") == tik.encode("12345 a")


def test_whole_batch_stream_and_processes_agree(small):
    texts = [text_of(random.Random(i)) for i in range(200)] + ["", " ", EOT]
    for allow in (False, True):
        ids = [small.encode(t, allow) for t in texts]
        batch = small.encode_batch(texts, allow)
        assert [b.tolist() for b in batch] == ids
    assert small.encode_batch([]) == []
    whole = "".join(texts)
    pieces = [whole[i : i + 7] for i in range(0, len(whole), 7)]
    assert list(small.encode_iterable(pieces)) == small.encode(whole)
    assert list(small.encode_iterable(pieces, True)) == small.encode(whole, True)
    long = PROSE * 9000  # several blocks
    assert (small.encode_array(long, processes=2) == small.encode_array(long)).all()
    assert small.encode_array("").dtype == np.int32 and small.encode("") == []


def test_forgetting_words_changes_nothing(small):
    forgetful = WordIds(small.bpe.encode_word, most=3)
    for seed in range(50):
        text = text_of(random.Random(seed))
        assert forgetful(*find_words(text)).tolist() == small.encode(text)


def test_long_words_without_a_trained_order():
    "Ranks that no training makes: a token before its parts."
    rng = random.Random(0)
    for _ in range(200):
        tokens = [bytes([i]) for i in range(256)]
        extra = {bytes(rng.choices(b"ab", k=rng.randint(2, 4))) for _ in range(6)}
        tokens += rng.sample(sorted(extra), len(extra))
        ranks = {t: i for i, t in enumerate(tokens)}
        word = bytes(rng.choices(b"ab", k=600))
        assert BPE(ranks).encode_word(word) == merge_by_rank(word, ranks)
        try:
            find_merges(ranks)
        except ValueError:
            continue
        assert merge_long(word, ranks) == merge_by_rank(word, ranks)


# --- vocabulary ------------------------------------------------------------


def test_stream_never_shows_half_a_character(small):
    for seed in range(100):
        text = text_of(random.Random(seed))
        decoder, shown = small.stream_decoder(), ""
        for i in small.encode(text):
            shown += decoder(i)
            assert text.startswith(shown)
        assert shown + decoder.flush() == text
    decoder = small.stream_decoder()
    assert decoder(240) == "" and decoder(97) == "\ufffda" and decoder.flush() == ""
    assert decoder(240) == "" and decoder.flush() == "\ufffd"


def test_any_ids_decode(small):
    rng = random.Random(3)
    for _ in range(200):
        ids = [rng.randrange(small.vocab_size) for _ in range(20)]
        decoder = small.stream_decoder()
        streamed = "".join(map(decoder, ids)) + decoder.flush()
        assert streamed == small.decode(ids) == small.decode(np.array(ids))
        ordinary = [i for i in ids if i != small.eot_id]
        assert small.n_bytes(ids) == len(small.decode_bytes(ordinary))


@pytest.mark.parametrize("bad", [-1, 10**6, 2**40])
def test_unknown_ids_are_refused(small, bad):
    for f in (small.decode, small.decode_bytes, small.n_bytes):
        with pytest.raises(ValueError, match=f"id {bad} is none of"):
            f([5, bad])


def test_save_and_load(small, tmp_path):
    chars = CharTokenizer(PROSE)
    for tokenizer in (small, chars):
        path = tmp_path / "sub" / "tokenizer.json"
        tokenizer.save(path)
        assert [p.name for p in path.parent.iterdir()] == ["tokenizer.json"]
        for again in (load_tokenizer(path), load_tokenizer(tokenizer.to_dict())):
            assert type(again) is type(tokenizer) and again.hash == tokenizer.hash
            assert again.encode(PROSE + EOT, True) == tokenizer.encode(PROSE + EOT, True)
    assert small.hash != chars.hash != CharTokenizer(PROSE + "ø").hash


def test_bad_files_get_one_line(tmp_path):
    path = tmp_path / "t.json"
    for text, message in [
        ("{", "not JSON"), ("[]", "is no tokenizer"), ('{"type": "bpe"}', "damaged"),
        ('{"model": {}}', "Hugging Face"), ('{"type": "bpe", "tokens": 3}', "damaged"),
        ('{"type":"bpe","pattern":"","special_tokens":{},"tokens":["a"]}', "256 bytes"),
    ]:  # fmt: skip
        path.write_text(text)
        with pytest.raises(ValueError, match=message) as e:
            load_tokenizer(path)
        assert "\n" not in str(e.value)
    path.write_bytes(b"\xff\xfe\0")
    with pytest.raises(ValueError, match="not JSON"):
        load_tokenizer(path)
    with pytest.raises(FileNotFoundError, match="no tokenizer at"):
        load_tokenizer(tmp_path / "none.json")
    path.write_text("YQ== 0\nYg==\n")
    with pytest.raises(ValueError, match="line 2"):
        from_tiktoken(path)
    for special in ({"": 300}, {"a b": 300}, {"x": 97}):
        with pytest.raises(ValueError):
            Tokenizer(BPE([]).ranks, special)


def test_characters():
    chars = CharTokenizer("hello wörld")
    assert chars.decode(chars.encode("hello wörld")) == "hello wörld"
    assert chars.decode(chars.encode("hex\ud800")) == "he\ufffd\ufffd"
    assert chars.encode("h" + EOT, True)[1:] == [chars.eot_id] == [chars.vocab_size - 1]
    assert chars.n_bytes(chars.encode("wö" + EOT, True)) == 3
    assert len(chars.encode(EOT)) == 13
    assert [a.tolist() for a in chars.encode_batch(["he", ""])] == [chars.encode("he"), []]
    assert CharTokenizer(["ab", "bc"]).characters == ["a", "b", "c", "\ufffd"]


# --- the same with fresh cases ---------------------------------------------


@pytest.mark.stress
@pytest.mark.timeout(1800)
def test_stress_fresh_cases(small, gpt2):
    regex = pytest.importorskip("regex")
    tokenizers = pytest.importorskip("tokenizers")
    same = known_to(regex)
    pairs = [(t, tiktoken_of(t)) for t in (small, gpt2)]
    exported = [
        tokenizers.Tokenizer.from_str(json.dumps(to_tokenizer_json(t))) for t, _ in pairs
    ]
    for seed in fresh_seeds(10_000):
        check_words(seed, regex, same)
        for (tokenizer, tik), theirs in zip(pairs, exported):
            check_like_tiktoken(seed, tokenizer, tik)
            check_like_tokenizers(seed, tokenizer, theirs)


@pytest.mark.stress
def test_stress_training():
    for seed in fresh_seeds(2000):
        check_training(seed)


@pytest.mark.stress
@pytest.mark.timeout(1800)
def test_stress_every_code_point_is_tiktokens(gpt2):
    tik = tiktoken_of(gpt2)
    points = [chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000]
    for form in ("c", "acb", "1c2", " c. "):
        for i in range(0, len(points), 100_000):
            text = "\n".join(form.replace("c", c) for c in points[i : i + 100_000])
            assert gpt2.encode(text) == tik.encode_ordinary(text)


@pytest.mark.stress
@pytest.mark.parametrize("name", HARD)
def test_stress_hard_texts(name):
    check_hard(HARD[name](1_000_000), 60)
