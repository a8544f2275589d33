"""tnlib: Kronecker, tensor-train and MPO compression of transformers. Public names below; each is loaded when first used."""

import importlib
import sys
import types

from tnlib.registration import register

__version__ = "0.1.0"

_PUBLIC = {
    "shapes": ["ShapeError", "balanced_modes", "fold", "unfold", "weight_of"],
    "block_low_rank": ["BlockLowRank"],
    "tensor_ring": ["TensorRing"],
    "low_rank": ["LowRank", "low_rank", "low_rank_errors"],
    "kronecker": ["Kronecker", "nearest_kronecker", "norm_preserving_scale", "prune_factors", "rearrange"],
    "permute": ["noise_like", "permutation_gain", "permute_kronecker"],
    "sweeps": ["als"],
    "tensor_train": ["TensorTrain", "tt_svd"],
    "tt_matrix": ["MPO", "TTMatrix", "ttm_svd"],
    "factorized": ["materialize_"],
    "layers": ["FactorizedEmbedding", "FactorizedLinear", "SplitLinear"],
    "audit": ["audit", "error_table", "null_rho"],
    "treatment": ["Budget", "Group", "Heal", "RecipeError"],
    "quant": ["FakeQuantize", "Quantize", "QuantizeError", "round_to_grid", "start_scale"],
    "packing": ["Packed", "QuantizedEmbedding", "pack", "unpack"],
    "recipe": ["Recipe", "Rule"],
    "papers": ["papers", "skeleton"],
    "plan": ["plan", "report"],
    "forecast": ["forecast"],
    "surgery": ["densify_", "factorize_"],
    "sequential": ["factorize_in_sequence_"],
    "baselines": ["asvd", "factorize_by_", "prune_", "svd_llm"],
    "stream": ["factorize_folder"],
    "checkpoint": ["TNConfig"],
    "model_card": ["model_card"],
    "saving": ["load", "save"],
    "hybrid_tt": [
        "HybridTTConfig",
        "dense_model",
        "get_compression_stats",
        "hybrid_model",
        "matched_recipe",
        "per_core_xavier_",
        "split_recipe",
    ],
    "quantize": ["fake_quantize_", "quantize_"],
    "quantized_size": ["quantized_size"],
    "torchao_kernels": ["use_torchao_"],
    "peft_lora": ["register_peft_"],
    "triton_kernels": ["kronecker_linear", "low_rank_linear", "use_triton_"],
    "resume": ["load_weights_", "save_weights"],
    "moments": ["Moments", "second_moments"],
    "gradients": ["with_gradients"],
    "metric": ["Metric"],
    "calibrate": ["Calibration", "calibrate", "calibrate_parts", "join_calibrations", "load_calibration"],
    "weighted": ["fit_weighted"],
    "weighted_train": ["spread_ranks", "sweep_train"],
    "layer_fit": ["LayerFit", "fit_metric"],
    "local": ["fit_layers_"],
    "profile": ["Profile", "Row", "Unit", "rank_correlation"],
    "sensitivity": ["sensitivity"],
    "proxies": ["proxy_profile"],
    "allocate": ["Allocation", "allocate"],
    "hand_rules": ["attention_split", "compactifai_rules", "uniform_rank", "uniform_ratio"],
    "heal": ["heal"],
    "history": ["History"],
    "stages": ["compress_and_heal"],
    "teacher": ["PrecomputedTeacher", "precompute_teacher"],
    "depth": ["drop_blocks"],
    "hidden": ["hidden_orders", "permute_hidden_"],
    "assets": ["AssetError", "fetch", "load_model", "load_tokenizer", "load_weight", "weight_names"],
    "data": ["batches", "byte_windows", "load_reviews", "load_text", "token_windows"],
    "token_file": ["load_windows"],
    "tasks": ["Task", "load_task"],
    "encode": ["encode_task"],
    "predict": ["predict"],
    "score": ["compare_scores", "score"],
    "compare": ["compare"],
    "evaluate": ["flops_per_token", "kl_to_teacher", "latency", "logits", "perplexity", "size"],
    "generate": ["generate"],
    "rouge": ["compare_rouge", "rouge"],
    "summaries": ["lead", "load_pairs", "summarize"],
    "speed": ["compare_speed"],
    "harness": ["harness"],
    "explore": ["Explorer", "bit_explorer", "fit_explorer"],
    "claims": ["VERDICTS", "claims", "overall_verdict"],
    "evidence": ["evidence", "judge"],
    "forest": ["claim_figure", "claims_figure"],
    "figures": ["label", "load_result", "save_figure", "save_result", "show_record", "use_style"],
}
_HOME = {name: module for module, names in _PUBLIC.items() for name in names}
__all__ = sorted(_HOME)


class _Package(types.ModuleType):
    """Keeps tn.plan and tn.papers what they are above when Python binds the submodule of the same name."""

    def __setattr__(self, name, value):
        if not (name in _HOME and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)

    def __getattr__(self, name):
        if name not in _HOME:
            raise AttributeError(f"module 'tnlib' has no attribute {name!r}")
        found = getattr(importlib.import_module(f"tnlib.{_HOME[name]}"), name)
        setattr(self, name, found)
        return found

    def __dir__(self):
        return [*super().__dir__(), *__all__]


sys.modules[__name__].__class__ = _Package
register()
