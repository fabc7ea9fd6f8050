"""The demo's rows: a small closed world of medicine in the shapes of PromptCBLUE's sixteen tasks.

Every sentence is written here; none comes from the benchmark. An answer follows from its input, and the
answers of a task are balanced, so that a score above chance has been learned. No prompt occurs twice.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, count
from random import Random
from typing import NamedTuple

from paddock.data import Row
from paddock.prompts import clean_input

ROWS_PER_TASK = {"train": 150, "dev": 6, "test": 10}

SYMPTOMS = tuple("头痛 咳嗽 发热 腹泻 呕吐 皮疹 胸闷 乏力 便秘 失眠 头晕 腹痛 鼻塞 流涕 心悸 水肿".split())
DISEASES = tuple("感冒 肺炎 胃炎 肠炎 哮喘 湿疹 贫血 鼻炎 高血压 糖尿病 胆囊炎 冠心病".split())
DRUGS = tuple("布洛芬 阿莫西林 益生菌 氨溴索 氯雷他定 奥美拉唑 二甲双胍 硝苯地平".split())
BODY_PARTS = tuple("头部 胸部 腹部 背部 鼻腔 咽喉 四肢 面部".split())
EXAMINATIONS = tuple("血常规 尿常规 胸片 心电图 超声 胃镜".split())
MANNERS = tuple("阵发性 持续性 轻度 剧烈".split())
DURATIONS = tuple("一天 两天 三天 四天 五天 一周 两周 一个月".split())
PEOPLE = tuple("宝宝 孩子 老人 妈妈 爸爸 病人 孕妇 学生".split())
ASPECTS = tuple("怎么治 吃什么药 做什么检查 能自愈吗 会传染吗 怎么预防".split())
QUALIFIERS = tuple("急性 慢性 儿童 老年".split())
REMEDIES = dict(zip(SYMPTOMS, DRUGS * 2, strict=True))
CHECKS = dict(zip(SYMPTOMS, (EXAMINATIONS * 3)[:16], strict=True))

# What a patient calls it, and the diagnosis that a coder writes for it.
STANDARD_TERMS = {
    "伤风": "上呼吸道感染", "受凉": "上呼吸道感染", "肺部发炎": "细菌性肺炎", "肺部感染": "细菌性肺炎",
    "胃部发炎": "慢性胃炎", "老胃病": "慢性胃炎", "气喘": "支气管哮喘", "喘息病": "支气管哮喘",
    "血压高": "原发性高血压", "高压病": "原发性高血压", "血糖高": "二型糖尿病", "消渴症": "二型糖尿病",
    "血色素低": "缺铁性贫血", "缺铁": "缺铁性贫血", "心绞痛": "冠状动脉硬化", "血管狭窄": "冠状动脉硬化",
}  # fmt: skip
CRITERIA = {
    "年龄": ("年龄大于", "周岁以上"), "性别": ("仅限女性", "仅限男性"), "怀孕相关": ("妊娠期", "哺乳期"),
    "吸烟状况": ("每日吸烟", "长期吸烟"), "酒精使用": ("酗酒", "每日饮酒"), "过敏耐受": ("药物过敏", "食物过敏"),
    "知情同意": ("签署同意书", "自愿参加"), "献血": ("近期献血", "曾经献血"),
}  # fmt: skip
INTENTS = {
    "病情诊断": ("是什么病", "怎么判断"), "病因分析": ("是什么原因", "为什么会得"),
    "治疗方案": ("怎么治疗", "如何医治"), "就医建议": ("挂什么科", "去哪家医院"),
    "注意事项": ("要注意什么", "不能吃什么"), "后果表述": ("会有什么后果", "严重吗"),
    "医疗费用": ("要花多少钱", "费用高吗"), "疾病描述": ("有什么表现", "有哪些类型"),
}  # fmt: skip
DIALOGUE_ACTS = {
    "关于症状的询问": ("有没有", "是不是一直"), "关于症状的回答": ("确实有点", "昨天开始"),
    "关于病因的询问": ("为什么会", "什么引起的"), "关于用药建议的提问": ("能吃药吗", "用什么药治"),
    "关于用药建议的解答": ("可以吃药缓解", "按时服药治"), "关于就医建议的解答": ("建议去医院看", "请尽快就诊查"),
    "关于注意事项的解答": ("要多休息防", "多喝温水防"), "非上述类型": ("谢谢医生", "再见医生"),
}  # fmt: skip
FINDINGS = {
    "已有症状疾病或者假设未来可能发生的疾病等": "出现了", "未患有症状疾病": "从来没有",
    "没有回答、不知道、回答不明确或者模棱两可不好推断": "说不清是否",
    "无实际意义的不标注或者和病人当前的状态独立不标注": "听邻居说起",
}  # fmt: skip
SYMPTOM_STATES = {"没有患有该症状": "并没有", "患有该症状": "这几天", "无法根据上下文确定病人是否患有该症状": "担心会"}
SUBSETS = ("完全一致", "后者是前者的语义子集", "后者是前者的语义父集", "语义无直接关联")
MATCHES = ("完全不匹配或者没有参考价值", "很少匹配有一些参考价值", "部分匹配", "完全匹配")


class Example(NamedTuple):
    input: str
    target: str
    answer_choices: Sequence[str] | None = None


# What writes an example: the turn counts a task's examples, and decides which of the answers is due.
Writer = Callable[[Random, int], Example]


def make_rows(seed: int) -> dict[str, list[Row]]:
    """Train, dev and test rows, each shuffled across the tasks; no prompt occurs twice in all of them."""
    rng = Random(seed)
    splits: dict[str, list[Row]] = {split: [] for split in ROWS_PER_TASK}
    for dataset, (task_type, writer) in TASKS.items():
        examples = _distinct(writer, rng)
        for split, number in ROWS_PER_TASK.items():
            for _ in range(number):
                text, target, choices = next(examples)
                choices = None if choices is None else tuple(choices)
                splits[split].append(Row(text, target, choices, task_type, dataset))
    for split, rows in splits.items():
        rng.shuffle(rows)
        splits[split] = [replace(row, sample_id=f"{split}-{number}") for number, row in enumerate(rows)]
    return splits


def frequent_phrases(rows: Iterable[Row], at_least: int = 12) -> list[str]:
    """The terms of the closed world, and what often stands between them and the punctuation."""
    between = re.compile("|".join([r"[\s\d“”，。：；？、]+", *sorted(TERMS, key=lambda term: (-len(term), term))]))
    texts = chain.from_iterable((row.input, row.target) for row in rows)
    found = Counter(chain.from_iterable(between.split(text) for text in texts))
    return sorted({*TERMS, *(phrase for phrase, number in found.items() if phrase and number >= at_least)})


def _distinct(writer: Writer, rng: Random) -> Iterator[Example]:
    seen: set[str] = set()
    for turn in count():
        example = writer(rng, turn)
        while clean_input(example.input) in seen:
            example = writer(rng, turn)
        seen.add(clean_input(example.input))
        yield example


def _prompt(rng: Random, *lines: str) -> str:
    """Three of four rows end in the answer cue, as the benchmark's do."""
    return "\n".join([*lines, "答："] if rng.random() < 0.75 else lines)


def _options(rng: Random, answers: Sequence[str], others: Iterable[str], number: int) -> list[str]:
    """The answers among `number` other choices, in any order."""
    options = [*answers, *rng.sample([other for other in others if other not in answers], number)]
    rng.shuffle(options)
    return options


def _clauses(rng: Random, clauses: dict[str, tuple[str, list[str]]], number: int) -> tuple[str, dict[str, list[str]]]:
    """Some of the clauses in any order as one sentence, and for each of them what it names."""
    chosen = rng.sample(sorted(clauses), number)
    return "，".join(clauses[kind][0] for kind in chosen), {kind: clauses[kind][1] for kind in chosen}


def _entity_lines(kinds: Iterable[str], named: dict[str, list[str]]) -> str:
    return "\n".join(["上述句子中的实体包含：", *(f"{kind}实体：{'，'.join(named.get(kind, []))}" for kind in kinds)])


def _cmeee(rng: Random, turn: int) -> Example:
    disease, drug, part = rng.choice(DISEASES), rng.choice(DRUGS), rng.choice(BODY_PARTS)
    symptoms = rng.sample(SYMPTOMS, 1 + turn % 2)
    clauses = {
        "疾病": (f"诊断为{disease}", [disease]),
        "临床表现": (f"出现{'和'.join(symptoms)}", symptoms),
        "药物": (f"给予{drug}", [drug]),
        "身体部位": (f"检查{part}", [part]),
    }
    sentence, named = _clauses(rng, clauses, 3)
    kinds = rng.sample(sorted(clauses), 2)
    text = _prompt(rng, f"找出句子中的{'，'.join(kinds)}实体：", f"患者{sentence}。")
    return Example(text, _entity_lines(kinds, named), kinds)


def _imcs_ner(rng: Random, turn: int) -> Example:
    symptom, drug, examination = rng.choice(SYMPTOMS), rng.choice(DRUGS), rng.choice(EXAMINATIONS)
    clauses = {
        "症状": (f"有点{symptom}", [symptom]),
        "具体的药物名称": (f"吃过{drug}", [drug]),
        "医学检查检验": (f"查了{examination}", [examination]),
    }
    sentence, named = _clauses(rng, clauses, 2)
    kinds = rng.sample(sorted(clauses), 1 + turn % 2)
    text = _prompt(rng, f"{rng.choice(PEOPLE)}{sentence}", f"上述问诊中的{'，'.join(kinds)}实体有哪些？")
    return Example(text, _entity_lines(kinds, named), kinds)


def _cmeie(rng: Random, turn: int) -> Example:
    disease, drug = rng.choice(DISEASES), rng.choice(DRUGS)
    symptom, examination = rng.choice(SYMPTOMS), rng.choice(EXAMINATIONS)
    clauses = {
        "药物治疗": (f"可用{drug}", [drug]),
        "临床表现": (f"多有{symptom}", [symptom]),
        "辅助检查": (f"应做{examination}", [examination]),
    }
    sentence, named = _clauses(rng, clauses, 2 + turn % 2)
    relations = rng.sample(sorted(clauses), 2)
    lines = [
        f"具有{relation}关系的头尾实体对如下："
        + "".join(f"头实体为{disease}，尾实体为{tail}。" for tail in named.get(relation, []))
        for relation in relations
    ]
    text = _prompt(rng, f"给出句子中的{'，'.join(relations)}关系的实体对：", f"{disease}{sentence}。")
    return Example(text, "\n".join(lines), relations)


def _cdee(rng: Random, turn: int) -> Example:
    first, second = rng.sample(SYMPTOMS, 2)
    part, manner, duration = rng.choice(BODY_PARTS), rng.choice(MANNERS), rng.choice(DURATIONS)
    sentence = f"{duration}前出现{part}{manner}{first}"
    lines = ["上述句子中的临床发现事件如下：", f"主体词：{first}；发生状态：；描述词：{manner}；解剖部位：{part}"]
    if turn % 2:
        sentence += f"，不伴{second}"
        lines.append(f"主体词：{second}；发生状态：否定；描述词：；解剖部位：")
    text = _prompt(rng, "临床发现事件抽取：", f"{sentence}。", "说明：事件由主体词，发生状态，描述词和解剖部位组成")
    return Example(text, "\n".join(lines))


def _cdn(rng: Random, turn: int) -> Example:
    names = rng.sample(sorted(STANDARD_TERMS), 2 if turn % 4 == 3 else 1)
    answers = list(dict.fromkeys(STANDARD_TERMS[name] for name in names))
    options = _options(rng, answers, sorted(set(STANDARD_TERMS.values())), 2)
    text = _prompt(rng, "找出归一后的标准词：", f"{'伴'.join(names)}", f"选项：{'，'.join(options)}")
    return Example(text, "，".join(answers), options)


def _mdcfnpc(rng: Random, turn: int) -> Example:
    states = rng.sample(sorted(FINDINGS), 2)
    symptoms = rng.sample(SYMPTOMS, 2)
    said = "，".join(f"{FINDINGS[state]}{symptom}" for state, symptom in zip(states, symptoms, strict=True))
    text = _prompt(
        rng,
        f"患者：{rng.choice(PEOPLE)}{said}。",
        f"临床发现实体：{'，'.join(symptoms)}",
        f"阴阳性选项：{'，'.join(FINDINGS)}",
    )
    lines = [f"{symptom}：{state}" for symptom, state in zip(symptoms, states, strict=True)]
    return Example(text, "\n".join(["上述对话中临床发现实体以及其阴阳性判别如下：", *lines]), list(FINDINGS))


def _imcs_sr(rng: Random, turn: int) -> Example:
    states = rng.sample(sorted(SYMPTOM_STATES), 1 + turn % 2)
    symptoms = rng.sample(SYMPTOMS, len(states))
    said = "，".join(f"{SYMPTOM_STATES[state]}{symptom}" for state, symptom in zip(states, symptoms, strict=True))
    text = _prompt(
        rng,
        "找出当前对话中的症状，并判断阴阳性：",
        f"患者：{rng.choice(PEOPLE)}{said}。",
        f"选项：{'，'.join(SYMPTOM_STATES)}",
    )
    lines = [f"{symptom}：{state}" for symptom, state in zip(symptoms, states, strict=True)]
    return Example(text, "\n".join(["当前对话中的症状及其阴阳性判断为：", *lines]), list(SYMPTOM_STATES))


def _sts(rng: Random, turn: int) -> Example:
    first, other = rng.sample(DISEASES, 2)
    second, answer = ((first, "是的"), (other, "不是"))[turn % 2]
    aspect = rng.choice(ASPECTS)
    text = _prompt(
        rng,
        f"“{first}{aspect}”，“{second}{aspect}”。",
        f"{rng.choice(('这两句', '两个问题'))}意思一样吗？",
        "选项：是的，不是",
    )
    return Example(text, answer, ["是的", "不是"])


def _qqr(rng: Random, turn: int) -> Example:
    first, other = rng.sample(DISEASES, 2)
    qualified = f"{rng.choice(QUALIFIERS)}{first}"
    answer = SUBSETS[turn % 4]
    left, right = dict(
        zip(SUBSETS, ((first, first), (first, qualified), (qualified, first), (first, other)), strict=True)
    )[answer]
    aspect = rng.choice(ASPECTS)
    text = _prompt(
        rng, f"“{left}{aspect}”，“{right}{aspect}”。", "后者与前者是什么关系？", f"选项：{'，'.join(SUBSETS)}"
    )
    return Example(text, answer, SUBSETS)


def _qtr(rng: Random, turn: int) -> Example:
    first, other = rng.sample(DISEASES, 2)
    aspect, another = rng.sample(ASPECTS, 2)
    answer = MATCHES[turn % 4]
    title = (f"{other}{another}", f"{other}{aspect}", f"{first}{another}", f"{first}{aspect}")[turn % 4]
    text = _prompt(rng, f"搜索：{first}{aspect}", f"标题：{title}", "匹配程度如何？", f"选项：{'，'.join(MATCHES)}")
    return Example(text, answer, MATCHES)


def _ir(rng: Random, turn: int) -> Example:
    first, other = rng.sample(SYMPTOMS, 2)
    second, answer = ((first, "相关"), (other, "不相关"))[turn % 2]
    text = _prompt(
        rng,
        f"医疗搜索：{first}怎么办",
        f"回答内容：{second}可以服用{rng.choice(DRUGS)}。",
        "搜索和回答是否相关？",
        "选项：相关，不相关",
    )
    return Example(text, answer, ["相关", "不相关"])


def _labelled(question: str, cues: Mapping[str, Sequence[str]], sentence: Callable[[Random, str], str]) -> Writer:
    """A task whose label follows from a cue in its sentence; each row offers some of the labels."""

    def write(rng: Random, turn: int) -> Example:
        answer = list(cues)[turn % len(cues)]
        options = _options(rng, [answer], cues, 3)
        text = _prompt(rng, sentence(rng, rng.choice(cues[answer])), question, f"选项：{'，'.join(options)}")
        return Example(text, answer, options)

    return write


def _meddg(rng: Random, turn: int) -> Example:
    symptom = SYMPTOMS[turn % len(SYMPTOMS)]
    text = _prompt(
        rng,
        "给出医生的下一句回复：",
        f"患者：{rng.choice(PEOPLE)}{symptom}{rng.choice(DURATIONS)}了。",
        "医生：还有别的不适吗？",
        f"患者：{rng.choice(BODY_PARTS)}也不舒服。",
    )
    return Example(text, f"{symptom}可以服用{REMEDIES[symptom]}，再查一下{CHECKS[symptom]}。")


def _mrg(rng: Random, turn: int) -> Example:
    symptom, duration = SYMPTOMS[turn % len(SYMPTOMS)], rng.choice(DURATIONS)
    disease, drug, examination = rng.choice(DISEASES), rng.choice(DRUGS), rng.choice(EXAMINATIONS)
    text = _prompt(
        rng,
        "根据问诊对话生成诊疗报告：",
        f"患者：{rng.choice(PEOPLE)}{symptom}{duration}了，吃过{drug}。",
        f"医生：像是{disease}，去查{examination}。",
    )
    lines = [
        f"主诉：{symptom}{duration}。",
        f"现病史：{symptom}{duration}，吃过{drug}。",
        "辅助检查：暂缺。",
        "既往史：不详。",
        f"诊断：{disease}。",
        f"建议：去查{examination}。",
    ]
    return Example(text, "\n".join(["上述问诊对话的诊疗报告如下：", *lines]))


_ctc = _labelled(
    "是什么临床试验筛选标准类型？", CRITERIA, lambda rng, cue: f"{rng.randint(1, 9)}、{cue}{rng.randint(10, 99)}；"
)
_qic = _labelled("这个搜索是什么意图？", INTENTS, lambda rng, cue: f"{rng.choice(PEOPLE)}{rng.choice(DISEASES)}{cue}")
_dac = _labelled("这句话是什么意图？", DIALOGUE_ACTS, lambda rng, cue: f"{cue}{rng.choice(SYMPTOMS)}")

TASKS: dict[str, tuple[str, Writer]] = {
    "CMeEE-V2": ("ner", _cmeee),
    "CMeIE": ("spo_generation", _cmeie),
    "CHIP-CDN": ("normalization", _cdn),
    "CHIP-CDEE": ("event_extraction", _cdee),
    "CHIP-STS": ("cls", _sts),
    "CHIP-CTC": ("cls", _ctc),
    "CHIP-MDCFNPC": ("attr_cls", _mdcfnpc),
    "KUAKE-IR": ("matching", _ir),
    "KUAKE-QIC": ("cls", _qic),
    "KUAKE-QQR": ("matching", _qqr),
    "KUAKE-QTR": ("matching", _qtr),
    "MedDG": ("response_generation", _meddg),
    "IMCS-V2-DAC": ("cls", _dac),
    "IMCS-V2-NER": ("ner", _imcs_ner),
    "IMCS-V2-SR": ("attr_cls", _imcs_sr),
    "IMCS-V2-MRG": ("report_generation", _mrg),
}

TERMS = frozenset(
    chain(
        *(SYMPTOMS, DISEASES, DRUGS, BODY_PARTS, EXAMINATIONS, MANNERS, DURATIONS, PEOPLE, ASPECTS, QUALIFIERS),
        *(STANDARD_TERMS, STANDARD_TERMS.values(), SUBSETS, MATCHES, SYMPTOM_STATES, SYMPTOM_STATES.values()),
        *(chain(cues, *cues.values()) for cues in (CRITERIA, INTENTS, DIALOGUE_ACTS)),
        *(FINDINGS, FINDINGS.values()),
    )
)
