"""Language consistency against counts made by hand, and against text that tries to break it."""

from __future__ import annotations

import pytest

from r1_megatron.config.schema import RewardConfig, RewardTermConfig
from r1_megatron.rewards.base import RewardError, build_rewards
from r1_megatron.rewards.language import (
    LANGUAGES,
    MAX_ASKED,
    MAX_CHARACTERS,
    count_words,
    detect_language,
    known_language,
    language_consistency,
    mixing,
)
from r1_megatron.rewards.words import prose_of
from r1_megatron.types import Prompt

CODE = "```python\n# add them up\ntotal = first + second\nprint(total)\n```"

# Text, language, words in it, words in another one. Chinese and Japanese are counted by character.
BY_HAND = [
    # All in one language.
    ("So the answer is seven.", "en", 5, 0),
    ("所以答案是七。", "zh", 6, 0),
    ("首先，我们把两个数相加，然后除以四。", "zh", 15, 0),
    ("Wait, let me check that again; it's wrong.", "en", 8, 0),
    ("Attends, je dois vérifier ce calcul encore une fois.", "fr", 9, 0),
    ("Zuerst addieren wir die beiden Zahlen.", "de", 6, 0),
    ("Primero sumamos los dos valores y luego dividimos.", "es", 8, 0),
    ("Сначала мы складываем два числа и делим на четыре.", "ru", 9, 0),
    ("먼저 두 수를 더합니다.", "ko", 4, 0),
    ("まず二つの数を足します。", "ja", 11, 0),
    ("Πρώτα προσθέτουμε τους δύο αριθμούς.", "el", 5, 0),
    # Another language.
    ("So the answer is seven.", "zh", 0, 5),
    ("所以答案是七。", "en", 0, 6),
    ("Primero sumamos los dos valores y luego dividimos.", "en", 0, 8),
    ("Attends, je dois vérifier ce calcul encore une fois.", "en", 0, 9),
    ("First we add the two numbers and then we divide.", "fr", 0, 10),
    ("First we add the two numbers and then we divide.", "de", 0, 10),
    ("Спочатку ми додаємо два числа і ділимо на чотири.", "ru", 0, 9),
    ("まず二つの数を足します。", "zh", 0, 11),
    ("首先我们把两个数相加然后除以四。", "ja", 0, 15),
    # Mixed.
    ("我们 need 计算 the sum。", "zh", 4, 3),
    ("We compute the sum. 等等，让我检查一下。", "en", 4, 8),
    ("首先计算 3+4=7。Wait, let me check that again. 所以是 7。", "zh", 7, 6),
    ("The 答案 is 七.", "en", 2, 3),
    ("However，我们再想一想。Therefore 答案是五。", "zh", 10, 2),
    ("So the sum is seven. Entonces la respuesta correcta es siete y terminamos.", "en", 5, 8),
    # Names, units, variables and functions in another script are not counted against it.
    ("小明和 Alice 一起买了苹果。", "zh", 9, 0),
    ("因为 New York Times 报道了这件事，所以我们相信 Bob 的话。", "zh", 16, 0),
    ("用 Python 计算，速度是 60 km/h，质量是 5kg。", "zh", 9, 0),
    ("设 x 和 y 是整数，求 sin(x) 的最大值 max f(x)。", "zh", 10, 0),
    ("令 x_1 等于 a2 加上 b3。", "zh", 5, 0),
    ("角 α 和角 β 相等。", "zh", 5, 0),
    ("延迟是 12 µs，集合 ℝ 与 xⁿ。", "zh", 6, 0),
    ("The city of Beijing (北京) is large.", "en", 6, 0),
    ("Иван и Мария живут в New York и работают там.", "ru", 8, 0),
    # But capital letters hide no prose, and names are no more than the words around them.
    ("Let Me Check The Sum Again。好。", "zh", 1, 6),
    ("Alpha Beta Gamma Delta", "zh", 0, 4),
    ("好。Alpha Beta Gamma Delta", "zh", 1, 3),
    ("Alice gave three red apples to Bob。他们很高兴。", "zh", 5, 7),
    # Code, formulae, numbers, addresses and tags.
    (f"我们写程序：\n{CODE}\n结果正确。", "zh", 9, 0),
    ("调用 `total_of(values)` 得到结果。", "zh", 6, 0),
    ("设 $x = \\frac{a}{b}$，则 \\(y^2 = \\max(x, 1)\\)，得到 $$z = \\text{const}$$ 和 \\[ w \\le x \\]。", "zh", 5, 0),
    ("由\n\\begin{align}\nfoo &= bar \\\\\n\\end{align}\n可知。", "zh", 3, 0),
    ("结果是 \\boxed{42}，即 1,234.5。", "zh", 4, 0),
    ("参见 https://example.com/some/page?x=1 或写信给 someone@example.com。", "zh", 6, 0),
    ("<think>先相加</think><answer>七</answer>", "zh", 4, 0),
    ("The price is $5 and he paid $7 in total.", "en", 8, 0),
    ("价格是 $5 and he paid with $7 元。", "zh", 4, 4),
    ("公式 $\\text{let me check the sum}$ 对。", "zh", 3, 5),
    ("The formula $我们$ is odd.", "en", 4, 2),
]


@pytest.mark.parametrize(("text", "language", "target", "foreign"), BY_HAND)
def test_words_counted_by_hand(text, language, target, foreign):
    counted = count_words(prose_of(text).text, language)
    assert (counted.target, counted.foreign) == (target, foreign), counted


def reward(completion: str, language: str | None = None, prompt: str = "", **options) -> float:
    metadata = {} if language is None else {"language": language}
    return language_consistency([prompt], [completion], [None], [metadata], **options)[0]


def test_the_reward_is_the_share():
    assert reward("我们 need 计算 the sum。", "zh") == 4 / 7
    assert reward("我们 need 计算 the sum。", "Chinese") == reward("我们 need 计算 the sum。", "zh-CN") == 4 / 7
    assert reward("我们 need 计算 the sum。", "en") == 3 / 7


def test_where_the_language_is_from():
    """The row says it, else the option, else the question."""
    text = "So the answer is seven."
    completions = [text] * 3
    metadata = [{"language": "en"}, {}, {}]
    assert language_consistency(["三加四等于几？"] * 3, completions, [None] * 3, metadata, language="zh") == [1, 0, 0]
    assert language_consistency(["三加四等于几？", "What is 3+4?"], [text] * 2, [None] * 2, [{}, {}]) == [0.0, 1.0]


@pytest.mark.parametrize(
    ("question", "language"),
    [
        ("小明有三个苹果", "zh"),
        ("What is 3+4?", "en"),
        ("Find x.", "en"),
        ("用 Python 写一个函数，返回 list 的 sum", "zh"),
        ("Combien font trois et quatre ?", "fr"),
        ("Wie viele Äpfel hat Peter jetzt?", "de"),
        ("¿Cuántas manzanas tiene María ahora?", "es"),
        ("Сколько будет три плюс четыре?", "ru"),
        ("りんごはいくつありますか", "ja"),
        ("사과는 몇 개입니까?", "ko"),
        ("3+4=", None),
        ("$\\frac{1}{2}$", None),
        ("", None),
        ("\ud800\u202e", None),
        (
            "<|im_start|>system\nYou help.<|im_end|>\n<|im_start|>user\n三加四<|im_end|>\n<|im_start|>assistant\n",
            "zh",
        ),
        ("You are a helpful assistant.<｜User｜>三加四等于几<｜Assistant｜><think>\n", "zh"),
        ("A conversation between User and Assistant. User: 三加四. Assistant:", "zh"),
    ],
)
def test_language_of_a_question(question, language):
    assert detect_language(question) == language


@pytest.mark.parametrize("name", ["xx", "", None, 3, "Klingon"])
def test_unknown_languages(name):
    with pytest.raises(ValueError, match="no known language: zh, ja"):
        known_language(name, "metadata.language")


def test_bad_options_and_rows_are_named():
    for options, said in (
        ({"language": "xx"}, "options.language='xx' is no known language"),
        ({"wordless": 2}, "options.wordless=2 has to be between 0 and 1"),
        ({"lang": "en"}, "unknown options lang; known are: language, wordless"),
    ):
        with pytest.raises(ValueError, match=said):
            build_rewards(RewardConfig((RewardTermConfig("language_consistency", 1.0, options),)))
    with build_rewards(RewardConfig((RewardTermConfig("language_consistency"),))) as grader:
        with pytest.raises(RewardError, match=r"no words to tell its language from.*metadata.*at prompt 3"):
            grader.grade([Prompt(3, "3+4=", (1,))], ["7"])
        with pytest.raises(RewardError, match=r"metadata.language='xx' is no known language"):
            grader.grade([Prompt(3, "3+4=", (1,), metadata={"language": "xx"})], ["7"])


def test_on_the_reasoning_alone():
    """As DeepSeek-R1: the words of the chain of thought."""
    term = RewardTermConfig("language_consistency", 1.0, {"language": "zh"}, on="reasoning")
    texts = ["<think>三加四 is 七</think><answer>seven it is</answer>", "<think>三", "七"]
    with build_rewards(RewardConfig((term,))) as grader:
        total = grader.grade([Prompt(0, "q", (1,))] * 3, texts).total
    assert total.tolist() == [4 / 5, 1.0, 0.0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3+4=7", 1.0),  # nothing but mathematics is in no wrong language
        ("$x$", 1.0),
        ("", 0.0),
        (" \n\t", 0.0),
        ("!!! ... ???", 0.0),
        ("🙂🙂", 0.0),
        ("\u202e\u2066\u200f", 0.0),
        ("\ud800\udfff", 0.0),
        ("\u0301" * 1000, 0.0),
        ("x y z", 0.0),
        (CODE, 0.0),  # nor does code earn what prose has to
        ("<think></think>", 0.0),
    ],
)
def test_without_a_word(text, expected):
    assert reward(text, "zh") == expected
    assert reward(text, "zh", wordless=0.0) == 0.0


@pytest.mark.parametrize(
    "text",
    [
        "w\u200ba\u200bi\u200bt l\u200be\u200bt me",  # letters kept apart by what is not seen
        "ｗａｉｔ ｌｅｔ ｍｅ",  # full-width
        "𝐰𝐚𝐢𝐭 𝑙𝑒𝑡 𝓂𝑒",  # mathematical letters
        "ⓦⓐⓘⓣ ⓛⓔⓣ ⓜⓔ",
        "w\u0301a\u0323it l\u0301e\u0301t me",
        "\u202ewait\u202c \u2066let\u2069 me",
        "wait\ud800let\udc00me",
    ],
)
def test_english_in_fancy_dress_is_english(text):
    assert reward(f"好的{text}", "zh") == 2 / 5


def test_a_word_without_an_end_is_in_no_language():
    assert reward("a" * 1000, "en") == 0.0
    assert reward("So the answer is " + "a" * 1000, "en") == 4 / 5


HOSTILE = {
    "words": "Primero sumamos los dos valores. ",
    "chinese": "等等，让我检查一下这个和。",
    "mixed": "我们 use the 方法 to 计算. ",
    "marks": "e\u0301\u0323",
    "hebrew points": "א\u05b0\u05b1",
    "signs": "好 a1 ",
    "dollars": "$a",
    "formulae": "\\(",
    "formulae 2": "\\[ \\a",
    "environments": "\\begin{a}",
    "ticks": "`",
    "fences": "```a",
    "tags": "<",
    "tags 2": "<think ",
    "addresses": "a@",
    "addresses 2": "http://",
    "surrogates": "\ud800",
    "right to left": "\u202eא",
    "dashes": "a-",
    "one letter": "好 b ",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_work_is_linear_in_the_length(name):
    """A text that took quadratic time would not end here."""
    text = HOSTILE[name] * (100_000 // len(HOSTILE[name]))
    for language in ("en", "zh"):
        assert 0.0 <= reward(text, language) <= 1.0


def test_ten_megabytes_are_no_response():
    text = "So the answer is seven. " * 420_000
    assert len(text) > 10_000_000
    assert reward(text, "en") == 0.0 and mixing(text) is None


def test_a_long_text_asks_the_detector_a_bounded_number_of_times(monkeypatch):
    asked: list[str] = []

    def ask(script, words):
        asked.append(script)
        return "es", 0.95

    monkeypatch.setattr("r1_megatron.rewards.language._ask", ask)
    assert count_words("Primero sumamos los dos. " * 5000, "fr") == (0, 20_000, 0)
    assert 0 < len(asked) <= MAX_ASKED


def test_no_place_of_a_long_text_is_safe():
    """Of 600 sentences 256 are heard; where a fixed stride of three would hear them, stands English."""
    french, english = "Nous additionnons encore les deux nombres. ", "First we add the two numbers. "
    for text in ((english + french + french) * 200, "So here it is. " + (english + french + french) * 200):
        assert reward(text, "en") == pytest.approx(1 / 3, abs=0.12)
        assert reward(text, "en") == reward(text, "en")
    assert reward(french * 600, "en") == 0.0 and reward(english * 600, "en") == 1.0


def test_a_sentence_without_an_end_is_heard_in_pieces(monkeypatch):
    asked: list[str] = []

    def ask(script, words):
        asked.append(" ".join(words))
        return "es", 0.95

    monkeypatch.setattr("r1_megatron.rewards.language._ask", ask)
    assert count_words("primero sumamos los dos " * 100, "fr") == (0, 400, 0)
    assert 8 <= len(asked) <= 9 and max(map(len, asked)) <= MAX_CHARACTERS + 20
    asked.clear()
    assert count_words("primero sumamos los dos " * 20_000, "fr") == (0, 80_000, 0)
    assert len(asked) == MAX_ASKED


def test_every_language_can_be_asked_for():
    for language in LANGUAGES:
        assert 0.0 <= reward("So the answer is seven, 所以答案是七。", language) <= 1.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("So the answer is seven.", 0.0),
        ("所以答案是七。", 0.0),
        ("We need 计算 the sum", 2 / 6),
        ("我们 need 计算 the sum of it", 4 / 9),
        ("小明和 Alice 一起买了苹果。", 0.0),
        ("まず二つの数を足します。", 0.0),
        ("3+4=7", None),
        ("", None),
    ],
)
def test_mixing_of_scripts(text, expected):
    assert mixing(text) == pytest.approx(expected)
