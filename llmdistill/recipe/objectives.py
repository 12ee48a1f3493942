"""The objectives of a recipe: what the student matches.  `objectives/build.py` builds them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from llmdistill.recipe.augments import AdversarialRecipe, MixRecipe, TokenDropoutRecipe
from llmdistill.recipe.contrasts import CrdRecipe, IcdRecipe, RrdRecipe
from llmdistill.recipe.distributions import (
    CkdRecipe,
    CorrelationRecipe,
    DistRecipe,
    ResponseRecipe,
)
from llmdistill.recipe.objective_base import (
    POOLS,
    Layers,
    ObjectiveSection,
    OnSamples,
    OnStates,
    WithProjectors,
    is_always_zero,
    is_zero_at_end,
    one_above_zero,
)
from llmdistill.recipe.schedules import CriticalPeriodRecipe, Weight
from llmdistill.recipe.tables import Table, defaults, one_of

DISTANCES = Table("objectives/features.py", "DISTANCES")
ADAPTORS = Table("objectives/exits.py", "ADAPTORS")
FILTERS = Table("objectives/rtk.py", "FILTERS")
KERNELS = Table("objectives/relations.py", "KERNELS")
_hidden = defaults("objectives/features.py", "HiddenObjective")
_rtk = defaults("objectives/rtk.py", "RtkObjective")
_embed = defaults("objectives/embed_distill.py", "EmbedDistillObjective")
_minilm = defaults("objectives/minilm.py", "MiniLMObjective")
_rkd = defaults("objectives/relations.py", "RkdObjective")
_pkt = defaults("objectives/relations.py", "PktObjective")
_flow = defaults("objectives/relations.py", "FlowObjective")
_states = defaults("objectives/states.py", "StateObjective")
_exits = defaults("objectives/exits.py", "ExitsObjective")


class CrossEntropyRecipe(ObjectiveSection):
    """Match the tokens themselves, as in supervised fine-tuning.  Tokens that the student wrote do
    not count, so the objective needs a rollout with other tokens.
    """

    kind: Literal["cross_entropy"] = "cross_entropy"


class HiddenRecipe(WithProjectors):
    """Match hidden states: FitNets, PKD, and the hidden and embedding losses of TinyBERT.  If the
    hidden sizes differ, a linear projector for each pair of layers is trained with the student and
    not exported.
    """

    RENAMED: ClassVar[Mapping[str, str]] = {"student_layer": "layers", "teacher_layer": "layers"}
    CHOICES: ClassVar[Mapping[str, Table]] = {"distance": DISTANCES}

    kind: Literal["hidden"] = "hidden"
    distance: one_of(DISTANCES) = _hidden.distance  # type: ignore[valid-type]
    """Distance between two states: `mse` is the mean squared difference, `normalized_mse` the
    squared difference of the states divided by their lengths, `cosine` 1 minus the cosine of the
    angle, and `l2` the length of the difference.
    """
    tokens: Literal["predicted", "all", "mean", "last"] = _hidden.tokens
    """Tokens whose states are matched: `predicted` takes the states that predict the response, and
    `all` also those of the prompt.  The others take one vector for each response: `mean` is the
    mean of its states, `last` the state that predicts its last token.
    """


class CkaRecipe(OnStates):
    """Match how hidden states are placed relative to each other, by linear CKA.  The models may
    differ in width without a projector.
    """

    kind: Literal["cka"] = "cka"
    tokens: Literal["predicted", "all"] = _states.tokens
    """Tokens whose states are compared: `predicted` takes the states that predict the response,
    `all` also those of the prompt.
    """


class RtkRecipe(ObjectiveSection):
    """Match the strength of hidden states over the tokens of a response (AFD).  Trained attention
    decides which layers of the models are compared, and a filter which layers of the teacher count
    (RTK).
    """

    CHOICES: ClassVar[Mapping[str, Table]] = {"filter": FILTERS}

    kind: Literal["rtk"] = "rtk"
    filter: one_of(FILTERS) = _rtk.filter  # type: ignore[valid-type]
    """How much each layer of the teacher counts: with `rtk` a layer counts more if some layer of
    the student is similar to it, with `afd` all count the same.
    """
    num_layers: int = Field(_rtk.num_layers, gt=0)
    """Number of layers of each model, which are evenly spaced."""
    projector_learning_rate: float | None = Field(None, gt=0)
    """Learning rate of the attention's queries and keys.  `null` is that of the student."""

    @property
    def teacher_needs(self) -> frozenset[str]:
        return frozenset({"hidden"})


class EmbedDistillRecipe(WithProjectors):
    """Match the embeddings of prompts and responses, which are their pooled hidden states, and the
    scores of all prompts of a batch against all responses (EmbedDistill).
    """

    CHOICES: ClassVar[Mapping[str, Table]] = {"distance": DISTANCES, "pool": POOLS}

    kind: Literal["embed_distill"] = "embed_distill"
    distance: one_of(DISTANCES) = _embed.distance  # type: ignore[valid-type]
    """Distance between two embeddings, as in an objective of kind `hidden`."""
    documents: Literal["teacher", "student"] = _embed.documents
    """Whose embeddings of responses the student's prompts are scored against.  With `teacher` only
    the embeddings of prompts are matched.
    """
    temperature: float = Field(_embed.temperature, gt=0)
    """Temperature of the scores."""
    pool: one_of(POOLS) = _embed.pool  # type: ignore[valid-type]
    """How the states of a prompt or a response become one vector: `mean` takes their mean, `last`
    the last one.
    """


class MiniLMRecipe(OnStates):
    """Match the relations between queries, between keys and between values of all tokens
    (MiniLMv2).
    The models may differ in width and in their numbers of attention heads.
    """

    kind: Literal["minilm"] = "minilm"
    relation_heads: int | None = Field(_minilm.relation_heads, gt=0)
    """Number of heads that the states are split into.  It must divide the widths of queries, keys
    and values of both models.  `null` takes the largest such number whose heads have at least 16
    numbers.
    """

    @property
    def teacher_needs(self) -> frozenset[str]:
        return frozenset({"queries", "keys", "values"})


class RkdRecipe(OnSamples):
    """Match the distances and angles between the responses of a batch (RKD)."""

    kind: Literal["rkd"] = "rkd"
    distance: float = Field(_rkd.distance, ge=0)
    """Factor on the loss of the distances."""
    angle: float = Field(_rkd.angle, ge=0)
    """Factor on the loss of the angles."""

    @model_validator(mode="after")
    def _one_factor(self) -> RkdRecipe:
        one_above_zero(self, "distance", "angle")
        return self


class SimilarityRecipe(OnSamples):
    """Match the similarities between the responses of a batch (SP).  The paper's `weight` is
    3,000.
    """

    kind: Literal["similarity"] = "similarity"


class PktRecipe(OnSamples):
    """Match which responses of a batch are each other's neighbours (PKT)."""

    CHOICES: ClassVar[Mapping[str, Table]] = {"pool": POOLS, "kernel": KERNELS}

    kind: Literal["pkt"] = "pkt"
    kernel: one_of(KERNELS, "both") = _pkt.kernel  # type: ignore[valid-type]
    """How similar two responses are: by their angle (`cosine`) or by their distance (`student_t`).
    `both` adds the losses of both.
    """


class FlowRecipe(PktRecipe):
    """Match the neighbours of each response along the layers: `pkt` over the inner pairs of layers,
    with a weight that fades early in training, and over the last pair, with `weight`.
    """

    kind: Literal["flow"] = "flow"  # type: ignore[assignment]
    layers: Layers = _flow.layers
    """Layers that are compared, as in an objective of kind `hidden`.  The last pair has `weight`,
    and the others share `inner_weight`.
    """
    inner_weight: Weight = CriticalPeriodRecipe(start=10.0)
    """Factor on the mean of the inner pairs: a number, or a schedule over the run."""

    @property
    def ends_at_zero(self) -> bool:
        return super().ends_at_zero and is_zero_at_end(self.inner_weight)

    @property
    def is_never_used(self) -> bool:
        return super().is_never_used and is_always_zero(self.inner_weight)


class ExitsRecipe(ObjectiveSection):
    """Give the student exits after some of its layers, which learn from its own last layer and from
    the labels (BYOT).  The exits are dropped when the student is exported.
    """

    CHOICES: ClassVar[Mapping[str, Table]] = {"adaptor": ADAPTORS}

    kind: Literal["exits"] = "exits"
    layers: Literal["quarters"] | list[int] = _exits.layers
    """Layers after which there is an exit, counted from 1: a list, or `quarters` for the layers at
    a quarter, a half and three quarters of the depth.
    """
    alpha: float = Field(_exits.alpha, ge=0, le=1)
    """Share of the divergence from the last layer in an exit's loss.  The cross-entropy of the
    labels has the rest.
    """
    temperature: float = Field(_exits.temperature, gt=0)
    """Temperature of this divergence, which is multiplied by its square."""
    state_weight: float = Field(_exits.state_weight, ge=0)
    """Factor on the squared distance between the states of an exit and of the last layer."""
    adaptor: one_of(ADAPTORS) = _exits.adaptor  # type: ignore[valid-type]
    """Trained parts of an exit: `mlp` is a norm and a small MLP, `norm` is a norm alone."""
    export: int | None = None
    """Exit that is exported as the student, with the layers up to it: one of `layers`.  It needs
    `adaptor: norm`.  `null` exports the whole student.
    """
    projector_learning_rate: float | None = Field(None, gt=0)
    """Learning rate of the exits.  `null` is that of the student."""

    @property
    def makes_the_student(self) -> bool:
        return self.export is not None

    @model_validator(mode="after")
    def _an_exit_can_be_exported(self) -> ExitsRecipe:
        if self.export is not None and (
            self.adaptor != "norm" or self.layers == "quarters" or self.export not in self.layers
        ):
            raise PydanticCustomError(
                "exits",
                "'export' needs 'adaptor: norm', and must be one of the layers in 'layers'.",
            )
        return self


ObjectiveRecipe = Annotated[
    ResponseRecipe
    | CrossEntropyRecipe
    | HiddenRecipe
    | CkaRecipe
    | RtkRecipe
    | EmbedDistillRecipe
    | MiniLMRecipe
    | RkdRecipe
    | SimilarityRecipe
    | PktRecipe
    | FlowRecipe
    | CrdRecipe
    | IcdRecipe
    | RrdRecipe
    | ExitsRecipe
    | CkdRecipe
    | DistRecipe
    | CorrelationRecipe
    | MixRecipe
    | AdversarialRecipe
    | TokenDropoutRecipe,
    Field(discriminator="kind"),
]
