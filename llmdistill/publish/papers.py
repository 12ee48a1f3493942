"""The papers behind the parts of a recipe, for its card: tables from a part to its paper."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from llmdistill.recipe import Recipe


class Paper(NamedTuple):
    """A paper: its key in BibTeX, its first author, its title, its year and its number on arXiv."""

    key: str
    author: str
    title: str
    year: int
    arxiv: str

    def bibtex(self) -> str:
        """Return the BibTeX entry."""
        fields = {
            "author": f"{self.author} and others",
            "title": f"{{{self.title}}}",
            "year": str(self.year),
            "eprint": self.arxiv,
            "archivePrefix": "arXiv",
        }
        lines = "".join(f"  {name} = {{{value}}},\n" for name, value in fields.items())
        return f"@misc{{{self.key},\n{lines}}}"


KD = Paper(
    "hinton2015",
    "Hinton, Geoffrey",
    "Distilling the Knowledge in a Neural Network",
    2015,
    "1503.02531",
)
SEQKD = Paper(
    "kim2016",
    "Kim, Yoon",
    "Sequence-Level Knowledge Distillation",
    2016,
    "1606.07947",
)
GKD = Paper(
    "agarwal2023",
    "Agarwal, Rishabh",
    "On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes",
    2023,
    "2306.13649",
)
MINILLM = Paper(
    "gu2023",
    "Gu, Yuxian",
    "MiniLLM: Knowledge Distillation of Large Language Models",
    2023,
    "2306.08543",
)
DISTILLM = Paper(
    "ko2024",
    "Ko, Jongwoo",
    "DistiLLM: Towards Streamlined Distillation for Large Language Models",
    2024,
    "2402.03898",
)
SKD = Paper(
    "xu2024",
    "Xu, Wenda",
    "Speculative Knowledge Distillation: Bridging the Teacher-Student Gap Through "
    "Interleaved Sampling",
    2024,
    "2410.11325",
)
AKL = Paper(
    "wu2024",
    "Wu, Taiqiang",
    "Rethinking Kullback-Leibler Divergence in Knowledge Distillation for Large Language Models",
    2024,
    "2404.02657",
)
OKD = Paper(
    "rao2024",
    "Rao, Jun",
    "Exploring and Enhancing the Transfer of Distribution in Knowledge Distillation for "
    "Autoregressive Language Models",
    2024,
    "2409.12512",
)
DML = Paper(
    "zhang2017",
    "Zhang, Ying",
    "Deep Mutual Learning",
    2017,
    "1706.00384",
)
TAKD = Paper(
    "mirzadeh2019",
    "Mirzadeh, Seyed-Iman",
    "Improved Knowledge Distillation via Teacher Assistant",
    2019,
    "1902.03393",
)
BORN_AGAIN = Paper(
    "furlanello2018",
    "Furlanello, Tommaso",
    "Born Again Neural Networks",
    2018,
    "1805.04770",
)
BYOT = Paper(
    "zhang2019",
    "Zhang, Linfeng",
    "Be Your Own Teacher: Improve the Performance of Convolutional Neural Networks via "
    "Self Distillation",
    2019,
    "1905.08094",
)
CES_KD = Paper(
    "amara2022",
    "Amara, Ibtihel",
    "CES-KD: Curriculum-based Expert Selection for Guided Knowledge Distillation",
    2022,
    "2209.07606",
)
OPSD = Paper(
    "zhao2026",
    "Zhao, Siyan",
    "Self-Distilled Reasoner: On-Policy Self-Distillation for Large Language Models",
    2026,
    "2601.18734",
)
TINYBERT = Paper(
    "jiao2019",
    "Jiao, Xiaoqi",
    "TinyBERT: Distilling BERT for Natural Language Understanding",
    2019,
    "1909.10351",
)
MINILM = Paper(
    "wang2020",
    "Wang, Wenhui",
    "MiniLMv2: Multi-Head Self-Attention Relation Distillation for Compressing Pretrained "
    "Transformers",
    2020,
    "2012.15828",
)
CKA = Paper(
    "kornblith2019",
    "Kornblith, Simon",
    "Similarity of Neural Network Representations Revisited",
    2019,
    "1905.00414",
)
EMBED_DISTILL = Paper(
    "kim2023",
    "Kim, Seungyeon",
    "EmbedDistill: A Geometric Knowledge Distillation for Information Retrieval",
    2023,
    "2301.12005",
)
RTK = Paper(
    "yang2022",
    "Yang, Jun-Teng",
    "Representative Teacher Keys for Knowledge Distillation Model Compression Based on "
    "Attention Mechanism for Image Classification",
    2022,
    "2206.12788",
)
RKD = Paper(
    "park2019",
    "Park, Wonpyo",
    "Relational Knowledge Distillation",
    2019,
    "1904.05068",
)
SIMILARITY = Paper(
    "tung2019",
    "Tung, Frederick",
    "Similarity-Preserving Knowledge Distillation",
    2019,
    "1907.09682",
)
PKT = Paper(
    "passalis2018",
    "Passalis, Nikolaos",
    "Learning Deep Representations with Probabilistic Knowledge Transfer",
    2018,
    "1803.10837",
)
FLOW = Paper(
    "passalis2020",
    "Passalis, Nikolaos",
    "Heterogeneous Knowledge Distillation using Information Flow Modeling",
    2020,
    "2005.00727",
)
CKD = Paper(
    "wilf2023",
    "Wilf, Alex",
    "Comparative Knowledge Distillation",
    2023,
    "2311.02253",
)
CRD = Paper(
    "tian2019",
    "Tian, Yonglong",
    "Contrastive Representation Distillation",
    2019,
    "1910.10699",
)
ICD = Paper(
    "giakoumoglou2024icd",
    "Giakoumoglou, Nikolaos",
    "Discriminative and Consistent Representation Distillation",
    2024,
    "2407.11802",
)
RRD = Paper(
    "giakoumoglou2024rrd",
    "Giakoumoglou, Nikolaos",
    "Relational Representation Distillation",
    2024,
    "2407.12073",
)
R2KD = Paper(
    "kim2023r2kd",
    "Kim, Seonghak",
    "Robustness-Reinforced Knowledge Distillation with Correlation Distance and Network Pruning",
    2023,
    "2311.13934",
)
DIST = Paper(
    "huang2022",
    "Huang, Tao",
    "Knowledge Distillation from A Stronger Teacher",
    2022,
    "2205.10536",
)
MIXKD = Paper(
    "liang2020",
    "Liang, Kevin J",
    "MixKD: Towards Efficient Distillation of Large-scale Language Models",
    2020,
    "2011.00593",
)
FGM = Paper(
    "miyato2016",
    "Miyato, Takeru",
    "Adversarial Training Methods for Semi-Supervised Text Classification",
    2016,
    "1605.07725",
)

# By the kind of a rollout, a teacher or an objective, and by the name of a divergence.
ROLLOUTS = {"interleaved": SKD, "mixed": GKD, "replay": DISTILLM}
WRITERS = {"teacher": SEQKD, "student": GKD}  # of a sampled rollout
TEACHERS = {
    "online": OKD, "mutual": DML, "chain": TAKD, "born_again": BORN_AGAIN, "curriculum": CES_KD,
    "reflexive": OPSD, "pruned": R2KD,
}  # fmt: skip
DIVERGENCES = {
    "forward_kl": KD, "reverse_kl": MINILLM, "jsd": GKD, "skew_forward_kl": DISTILLM,
    "skew_reverse_kl": DISTILLM, "adaptive_kl": AKL,
}  # fmt: skip
OBJECTIVES = {
    "hidden": TINYBERT, "minilm": MINILM, "cka": CKA, "embed_distill": EMBED_DISTILL, "rtk": RTK,
    "rkd": RKD, "similarity": SIMILARITY, "pkt": PKT, "flow": FLOW, "ckd": CKD, "crd": CRD,
    "icd": ICD, "rrd": RRD, "correlation": R2KD, "dist": DIST, "mixkd": MIXKD, "adversarial": FGM,
    "token_dropout": R2KD, "exits": BYOT,
}  # fmt: skip


def papers_of(recipe: Recipe) -> list[Paper]:
    """Return the papers of a recipe's rollout, teacher and objectives, each once."""
    found = [*_of_rollout(recipe.rollout.model_dump())]
    found.append(TEACHERS.get(recipe.teacher.kind))
    for one in recipe.objectives:
        found += _of_objective(one.model_dump())
    return list(dict.fromkeys(paper for paper in found if paper is not None))


def _of_rollout(section: dict[str, Any]) -> Iterator[Paper | None]:
    kind = section.get("kind")
    yield WRITERS.get(section["by"]) if kind == "sampled" else ROLLOUTS.get(str(kind))
    for inner in section.values():
        if isinstance(inner, dict) and "kind" in inner:
            yield from _of_rollout(inner)


def _of_objective(section: dict[str, Any]) -> Iterator[Paper | None]:
    yield OBJECTIVES.get(section["kind"])
    if "divergence" in section:
        yield DIVERGENCES.get(section["divergence"])
    if isinstance(section.get("of"), dict):
        yield from _of_objective(section["of"])
