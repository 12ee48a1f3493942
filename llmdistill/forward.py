"""The forward pass that teacher and student share, and the only place where heads are narrowed.

B = sequences, T = tokens, S = tokens of all sequences, N = predicted tokens, H = hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from llmdistill.batch import Sequences, StudentView, TeacherSignal
from llmdistill.errors import TrainingError
from llmdistill.models.heads import split
from llmdistill.models.taps import Need, taps
from llmdistill.models.unpadded import reads_without_padding, states_without_padding
from llmdistill.protocols import Teacher, scores_anew


def read(
    model: Any, sequences: Sequences, num_tokens: int, needs: Iterable[Need] = ()
) -> StudentView:
    """Run one forward pass of a causal LM and return its output at the N predicted tokens.

    Args:
        model: A causal LM of transformers, plain or PEFT.
        sequences: The batch, on the model's device.
        num_tokens: Number of ids that the tokenizer uses.  The head is cut to them: the padding
            rows after them have no meaning and must not take part in a softmax.
        needs: The inner states to keep.

    Returns:
        The final hidden states that predict the N tokens, the narrowed head, and the states.
    """
    # A function that changes embeddings expects them as (B, T, H).
    padded = sequences.embedding_change is not None or not reads_without_padding(model)
    masks = _masks(sequences)
    with taps(model, needs) as found:
        final = _final_states(split(model)[0], sequences, padded=padded)
    # Only now: FSDP2 has a whole head once the last states have been computed.
    head = split(model)[1]
    if not padded:
        real_BT = sequences.attention_mask_BT.bool()
        masks = {name: mask_BT[real_BT][None] for name, mask_BT in masks.items()}
    return StudentView(final[masks["predicted"]], head.narrow(num_tokens), _kept(found, masks))


def teacher_signal(
    teacher: Teacher, sequences: Sequences, num_tokens: int, needs: frozenset[Need]
) -> TeacherSignal | None:
    """Return the teacher's signal over the shared ids, or None if nothing is needed.

    A signal that was made while the sequences were written is used if it covers `needs`; otherwise
    the teacher runs a forward pass.  The states of the result are on the device of the sequences.
    Raises TrainingError if the teacher does not return everything.
    """
    if not needs:
        return None
    signal = sequences.signal
    # A signal from writing comes from one plain pass without gradients.  So a teacher that is
    # trained or blends passes needs a new one, and so does one that reads changed embeddings.
    as_written = sequences.embedding_change is None and not scores_anew(teacher)
    if signal is None or not as_written or not signal.covers(needs):
        signal = teacher.judge(sequences, needs)
    if not signal.covers(needs):
        asked = ", ".join(sorted(map(str, needs)))
        raise TrainingError(
            f"{type(teacher).__name__}.judge did not return everything that it was asked for: "
            f"{asked}. Return a TeacherSignal that covers all of its `needs`."
        )
    return signal.narrow(num_tokens).states_on(sequences.input_ids_BT.device)


def _final_states(backbone: Any, sequences: Sequences, *, padded: bool) -> Tensor:
    """Return the backbone's final hidden states: (B, T, H), or (1, S, H) without padding."""
    ids_BT, mask_BT = sequences.input_ids_BT, sequences.attention_mask_BT
    if not padded:
        return states_without_padding(backbone, ids_BT, mask_BT)
    inputs: dict[str, Tensor] = {"input_ids": ids_BT}
    if sequences.embedding_change is not None:
        embed = backbone.get_input_embeddings()
        inputs = {"inputs_embeds": sequences.embedding_change(embed, ids_BT)}
    output = backbone(
        **inputs,
        attention_mask=mask_BT,
        # Tokens are counted, not columns, so padding on the left changes nothing either.
        position_ids=(mask_BT.cumsum(1) - 1).clamp_min(0),
        use_cache=False,
    )
    return output.last_hidden_state


def _masks(sequences: Sequences) -> dict[str, Tensor]:
    """Return the mask of each choice of tokens that a need can name: (B, T)."""
    return {"predicted": sequences.predictor_mask_BT, "all": sequences.trained_mask_BT}


def _kept(found: Mapping[Need, Tensor], masks: Mapping[str, Tensor]) -> dict[Need, Tensor]:
    """Return each state at the tokens that its need names, row by row."""
    return {need: state[masks[need.tokens].to(state.device)] for need, state in found.items()}
