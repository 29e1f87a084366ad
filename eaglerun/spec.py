"""TargetSpec and DraftSpec: the two architectures, as their checkpoints' config.json state them."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TargetSpec:
    """MiniMax-M3's text model. Widths in elements, layer lists indexed by layer.

    sparse_layers[i]  layer i has block-sparse attention with a lightning indexer, else full
    moe_layers[i]     layer i has routed experts and a shared one, else a dense MLP
    index_shared[i]   sparse layer i takes the block selection of the last sparse layer that
                      computed one (cross-layer index sharing, an approximation; off by default)
    """

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    expert_intermediate_size: int
    shared_intermediate_size: int
    dense_intermediate_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rotary_dim: int
    swiglu_alpha: float
    swiglu_limit: float
    swiglu_beta: float
    num_experts: int
    num_experts_per_tok: int
    routed_scaling_factor: float
    use_routing_bias: bool
    moe_layers: tuple[bool, ...]
    sparse_layers: tuple[bool, ...]
    index_shared: tuple[bool, ...]
    index_head_dim: int
    num_index_heads: int
    sparse_topk_blocks: int
    sparse_block_size: int
    sparse_init_blocks: int
    sparse_local_blocks: int
    tie_word_embeddings: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class DraftSpec:
    """An EAGLE3 draft of one Llama layer (SafeAILab/EAGLE; EAGLE-3.1 toggles).

    taps                  target layers whose input residual stream is captured, increasing
    target_hidden_size    width of one captured chunk; fc takes len(taps) of them
    use_aux_hidden_state  false: no fc, the one captured chunk is the hidden state itself
    fc_norm               one RMSNorm per chunk before fc;  norm_before_fc: one over all chunks
    norm_output           the state fed back is the normed one
    norm_before_residual  the residual is the hidden_norm output
    draft_vocab_size      rows of the head; below vocab_size a d2t table maps draft to target ids
    sliding_window        None: full causal attention
    """

    hidden_size: int
    target_hidden_size: int
    taps: tuple[int, ...]
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    draft_vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    attention_bias: bool
    use_aux_hidden_state: bool
    fc_norm: bool
    norm_before_fc: bool
    norm_output: bool
    norm_before_residual: bool
    logit_scale: float
    sliding_window: int | None
    tie_word_embeddings: bool
    dtype: str
