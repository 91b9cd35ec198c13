"""The digits as conversations: right answers, no scan of the benchmark, a tokenizer that fits."""

from collections import Counter

from nanovlm.config.sources import build_config, preset_layer
from nanovlm.data.digits import (
    KINDS,
    LETTERS,
    NUM_ORDERS,
    digits_benchmark_rows,
    split_scans,
)
from nanovlm.data.digits_tiles import digits_tiles_tokenizer, digits_tiles_training_rows
from nanovlm.data.text import mmstar_message
from nanovlm.data.tokenizer import check_tokens, model_tokenizer
from tests.data.test_digits import DIGIT_OF_SCAN, parse_options, scan_of


def right_answer(question: str, digits: list[int]) -> str:
    """Return the answer to a question without its options."""
    if question == "Which scan shows the larger digit?":
        first, second = digits
        return "both" if first == second else ("first" if first > second else "second")
    if question == "Which digit does the second scan show?":
        return str(digits[1])
    (digit,) = digits
    return next(kind for kind in KINDS if kind.question == question).answer(digit)


def test_every_answer_is_right_and_no_scan_is_the_benchmarks() -> None:
    asked = {scan_of(image) for image in digits_benchmark_rows()["image"]}
    seen = Counter[tuple[int, int]]()
    for row in digits_tiles_training_rows():
        scans = [scan_of(image) for image in row["images"]]
        assert not asked & set(scans)
        seen[len(scans), len(row["texts"])] += 1
        for turn in row["texts"]:
            question, answer = turn["user"], turn["assistant"]
            if "Options" in question:
                whole, _, suffix = question.rpartition("\n")
                assert mmstar_message(whole) == question and suffix
                question, options = parse_options(whole)
                answer = options[LETTERS.index(answer)]
            assert answer == right_answer(question, [DIGIT_OF_SCAN[scan] for scan in scans])
    assert set(seen) == {(1, 1), (1, 2), (2, 2)}


def test_as_many_orders_as_in_digits_are_asked_where_no_turn_before_tells_the_digit() -> None:
    num_asked = Counter[bytes]()
    for row in digits_tiles_training_rows():
        if row["texts"][0]["user"].startswith(f"{KINDS[0].question}\nOptions"):
            num_asked[scan_of(row["images"][0])] += 1
    scans, _ = split_scans()
    assert num_asked == {scan.pixels.tobytes(): NUM_ORDERS for scan in scans}


def test_the_tokenizer_knows_every_word_and_the_preset_fits_it() -> None:
    tokenizer, rows = digits_tiles_tokenizer(), digits_tiles_training_rows()
    texts = [f"{t['user']} {t['assistant']}" for turns in rows["texts"] for t in turns]
    texts += [mmstar_message(question) for question in digits_benchmark_rows()["question"]]
    texts.append("<image: 0> <image: 1>")
    assert all(1 not in encoding.ids for encoding in tokenizer.encode_batch(texts))
    vlm = build_config(preset_layer("digits-tiles")).vlm
    assert tokenizer.get_vocab_size() == vlm.lm_base_vocab_size
    assert tokenizer.id_to_token(vlm.lm_eos_token_id) == "<|im_end|>"
    check_tokens(vlm, model_tokenizer(vlm))
