"""The forward pass that teacher and student share, and the one place where heads are narrowed.

B = sequences, T = tokens, N = predicted tokens, H = hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from llmdistill.batch import Sequences, StudentView, TeacherSignal
from llmdistill.errors import TrainingError
from llmdistill.models.heads import split
from llmdistill.models.taps import Need, taps
from llmdistill.protocols import Teacher


def read(
    model: Any, sequences: Sequences, num_tokens: int, needs: Iterable[Need] = ()
) -> StudentView:
    """One forward pass of a causal LM: what predicts the N tokens, and the states asked for.

    The head is cut to the first `num_tokens` ids: the padding rows behind them mean nothing and
    belong into no softmax.
    """
    backbone, head = split(model)
    with taps(model, needs) as found:
        hidden_NH = _final_hidden(backbone, sequences)
    return StudentView(hidden_NH, head.narrow(num_tokens), _kept(found, sequences))


def teacher_signal(
    teacher: Teacher, sequences: Sequences, num_tokens: int, needs: frozenset[Need]
) -> TeacherSignal | None:
    """What the teacher says of the tokens, over the shared ids and with states on the sequences'
    device; None if nothing is needed.

    A signal that was made while the sequences were written is used if it holds all of it.  It was
    made without gradients and from the plain embeddings.  A teacher that trains therefore judges
    in a new pass, and so does one that reads changed embeddings.  Raises TrainingError if
    something is missing.
    """
    if not needs:
        return None
    signal = sequences.signal
    as_written = sequences.embedding_change is None and not isinstance(teacher, nn.Module)
    if signal is None or not as_written or not signal.covers(needs):
        signal = teacher.judge(sequences, needs)
    if not signal.covers(needs):
        asked = ", ".join(sorted(map(str, needs)))
        raise TrainingError(
            f"{type(teacher).__name__}.judge did not return everything that it was asked for: "
            f"{asked}. Return a TeacherSignal that covers all of its `needs`."
        )
    return signal.narrow(num_tokens).states_on(sequences.input_ids_BT.device)


def _final_hidden(backbone: Any, sequences: Sequences) -> Tensor:
    """The backbone's final hidden states at the positions that predict: (N, H)."""
    inputs: dict[str, Tensor] = {"input_ids": sequences.input_ids_BT}
    if sequences.embedding_change is not None:
        embedded_BTH = backbone.get_input_embeddings()(sequences.input_ids_BT)
        inputs = {"inputs_embeds": sequences.embedding_change(embedded_BTH)}
    output = backbone(
        **inputs,
        attention_mask=sequences.attention_mask_BT,
        position_ids=(sequences.attention_mask_BT.cumsum(1) - 1).clamp_min(0),
        use_cache=False,
    )
    return output.last_hidden_state[sequences.predictor_mask_BT]


def _kept(found: Mapping[Need, Tensor], sequences: Sequences) -> dict[Need, Tensor]:
    """Each state at the tokens that its need names, row by row."""
    masks = {
        "predicted": sequences.predictor_mask_BT,
        "all": sequences.trained_mask_BT,
    }
    return {need: state[masks[need.tokens].to(state.device)] for need, state in found.items()}
