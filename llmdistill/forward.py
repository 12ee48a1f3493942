"""The forward pass that teacher and student share.

B = sequences, T = tokens, N = predicted tokens, H = hidden size.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from llmdistill.batch import Sequences


def final_hidden(backbone: Any, sequences: Sequences) -> Tensor:
    """The backbone's final hidden states at the places that predict: (N, H)."""
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
