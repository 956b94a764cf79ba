// Python bindings of fipo.h: its structs as classes with keyword constructors, its functions without the GIL.
// Pointers are integers, 0 for null. Arguments are checked in `megatron_fipo/ops/extension.py`, not here.
#include <pybind11/pybind11.h>

#include "fipo.h"
#include "lm_head.h"

namespace py = pybind11;
using namespace py::literals;
using Address = uintptr_t;

namespace {

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

void bind_inputs(py::module_& module) {
  py::class_<fipo::Tokens>(module, "Tokens")
      .def(py::init([](Address log_probs, Address old_log_probs, Address mask, Address offsets, Address advantages,
                       Address token_weights, int64_t num_tokens, int64_t num_segments, bool advantages_per_token,
                       bool bfloat16) {
             return fipo::Tokens{pointer<const void>(log_probs),
                                 pointer<const void>(old_log_probs),
                                 pointer<const uint8_t>(mask),
                                 pointer<const int64_t>(offsets),
                                 pointer<const float>(advantages),
                                 pointer<const float>(token_weights),
                                 num_tokens,
                                 num_segments,
                                 advantages_per_token,
                                 bfloat16 ? fipo::Float::kBFloat16 : fipo::Float::kFloat32};
           }),
           py::kw_only(), "log_probs"_a, "old_log_probs"_a, "mask"_a, "offsets"_a, "advantages"_a = 0,
           "token_weights"_a = 0, "num_tokens"_a, "num_segments"_a, "advantages_per_token"_a = true,
           "bfloat16"_a = false);

  py::class_<fipo::Constants>(module, "Constants")
      .def(py::init([](double half_life, float log_ratio_clamp, float log_dual_clip, float dual_clip, float ratio_low,
                       float ratio_high, float influence_low, float influence_high, float safety_threshold,
                       float clipped_below, float clipped_above, float norm_length, int64_t max_dual_clipped,
                       int aggregation, bool influence) {
             return fipo::Constants{half_life,
                                    log_ratio_clamp,
                                    log_dual_clip,
                                    dual_clip,
                                    ratio_low,
                                    ratio_high,
                                    influence_low,
                                    influence_high,
                                    safety_threshold,
                                    clipped_below,
                                    clipped_above,
                                    norm_length,
                                    max_dual_clipped,
                                    static_cast<fipo::Aggregation>(aggregation),
                                    influence};
           }),
           py::kw_only(), "half_life"_a, "log_ratio_clamp"_a, "log_dual_clip"_a, "dual_clip"_a = 0.0f,
           "ratio_low"_a = 0.0f, "ratio_high"_a = 0.0f, "influence_low"_a = 0.0f, "influence_high"_a = 0.0f,
           "safety_threshold"_a = 0.0f, "clipped_below"_a = 0.0f, "clipped_above"_a = 0.0f, "norm_length"_a = 1.0f,
           "max_dual_clipped"_a = -1, "aggregation"_a = 0, "influence"_a = true);

  py::class_<fipo::Shard>(module, "Shard")
      .def(py::init([](Address carry_in, Address vetoed, Address sequence_tokens, Address counts_sequence) {
             return fipo::Shard{pointer<const float>(carry_in), pointer<const uint8_t>(vetoed),
                                pointer<const int64_t>(sequence_tokens), pointer<const uint8_t>(counts_sequence)};
           }),
           py::kw_only(), "carry_in"_a = 0, "vetoed"_a = 0, "sequence_tokens"_a = 0, "counts_sequence"_a = 0);
}

void bind_outputs(py::module_& module) {
  py::class_<fipo::ScanOutput>(module, "ScanOutput")
      .def(py::init([](Address future_kl, Address carry_out, Address dual_clipped, Address loss_tokens) {
             return fipo::ScanOutput{pointer<float>(future_kl), pointer<float>(carry_out),
                                     pointer<int64_t>(dual_clipped), pointer<int64_t>(loss_tokens)};
           }),
           py::kw_only(), "future_kl"_a = 0, "carry_out"_a = 0, "dual_clipped"_a = 0, "loss_tokens"_a = 0);

  py::class_<fipo::LossOutput>(module, "LossOutput")
      .def(py::init([](Address gradient, Address future_kl, Address influence_weights, Address loss_sum,
                       Address metrics, Address histograms, Address vetoed) {
             return fipo::LossOutput{pointer<float>(gradient),          pointer<float>(future_kl),
                                     pointer<float>(influence_weights), pointer<float>(loss_sum),
                                     pointer<double>(metrics),          pointer<int64_t>(histograms),
                                     pointer<uint8_t>(vetoed)};
           }),
           py::kw_only(), "gradient"_a, "future_kl"_a = 0, "influence_weights"_a = 0, "loss_sum"_a, "metrics"_a,
           "histograms"_a, "vetoed"_a);
}

void bind_lm_head(py::module_& module) {
  const auto dtype = [](bool bfloat16) { return bfloat16 ? fipo::Float::kBFloat16 : fipo::Float::kFloat32; };
  py::class_<fipo::Logits>(module, "Logits")
      .def(py::init([dtype](Address values, Address targets, int64_t rows, int64_t columns, int64_t stride,
                            float inverse_temperature, bool bfloat16) {
             return fipo::Logits{pointer<const void>(values), pointer<const int64_t>(targets), rows, columns, stride,
                                 inverse_temperature,         dtype(bfloat16)};
           }),
           py::kw_only(), "values"_a, "targets"_a, "rows"_a, "columns"_a, "stride"_a, "inverse_temperature"_a,
           "bfloat16"_a);

  py::class_<fipo::LogitStatistics>(module, "LogitStatistics")
      .def(py::init([](Address maximum, Address sum_exp, Address sum_exp_shifted, Address target) {
             return fipo::LogitStatistics{pointer<float>(maximum), pointer<float>(sum_exp),
                                          pointer<float>(sum_exp_shifted), pointer<float>(target)};
           }),
           py::kw_only(), "maximum"_a, "sum_exp"_a, "sum_exp_shifted"_a, "target"_a);

  py::class_<fipo::LogitGradient>(module, "LogitGradient")
      .def(py::init([dtype](Address values, int64_t stride, bool bfloat16, Address logsumexp, Address log_prob,
                            Address slope, Address offset) {
             return fipo::LogitGradient{pointer<void>(values),          stride,
                                        dtype(bfloat16),                pointer<const float>(logsumexp),
                                        pointer<const float>(log_prob), pointer<const float>(slope),
                                        pointer<const float>(offset)};
           }),
           py::kw_only(), "values"_a, "stride"_a, "bfloat16"_a, "logsumexp"_a, "log_prob"_a, "slope"_a, "offset"_a);
}

void bind_metrics(py::module_& module) {
  py::dict slots;
  const auto slot = [&slots](const char* name, fipo::Metric metric) { slots[name] = static_cast<int>(metric); };
  slot("loss_sum", fipo::kLossSum);
  slot("num_tokens", fipo::kNumTokens);
  slot("num_sequences", fipo::kNumSequences);
  slot("loss_tokens", fipo::kLossTokens);
  slot("loss_sequences", fipo::kLossSequences);
  slot("vetoed", fipo::kVetoed);
  slot("approx_kl", fipo::kApproxKl);
  slot("ppo_clip_fraction", fipo::kPpoClipped);
  slot("dual_clip_fraction", fipo::kDualClipped);
  slot("negative_ratio_2_3", fipo::kNegative2To3);
  slot("negative_ratio_3_4", fipo::kNegative3To4);
  slot("negative_ratio_4_10", fipo::kNegative4ToDual);
  slot("positive_ratio_below_1e3", fipo::kPositiveBelow1e3);
  slot("future_kl", fipo::kFutureKl);
  slot("influence_weight", fipo::kInfluence);
  slot("influence_weight_raw", fipo::kInfluenceRaw);
  slot("influence_clip_fraction_upper", fipo::kInfluenceClippedUpper);
  slot("influence_clip_fraction_lower", fipo::kInfluenceClippedLower);
  slot("log_ratio_abs_max", fipo::kLogRatioAbsMax);
  slot("negative_ratio_max", fipo::kNegativeRatioMax);
  slot("positive_ratio_min", fipo::kPositiveRatioMin);
  slot("positive_ratio_max", fipo::kPositiveRatioMax);
  slot("future_kl_min", fipo::kFutureKlMin);
  slot("future_kl_max", fipo::kFutureKlMax);
  slot("influence_weight_min", fipo::kInfluenceMin);
  slot("influence_weight_max", fipo::kInfluenceMax);
  slot("influence_weight_raw_min", fipo::kInfluenceRawMin);
  slot("influence_weight_raw_max", fipo::kInfluenceRawMax);
  module.attr("METRIC_SLOTS") = slots;
  module.attr("NUM_METRICS") = static_cast<int>(fipo::kNumMetrics);
  module.attr("HISTOGRAM_BINS") = fipo::kHistogramBins;
}

// What megatron_fipo/config/loss.py and algorithm/metrics.py define, too, for the test that compares them.
void bind_constants(py::module_& module) {
  py::dict aggregations;
  const auto aggregation = [&aggregations](const char* name, fipo::Aggregation value) {
    aggregations[name] = static_cast<int>(value);
  };
  aggregation("token-mean", fipo::Aggregation::kTokenMean);
  aggregation("seq-mean-token-sum", fipo::Aggregation::kSeqMeanTokenSum);
  aggregation("seq-mean-token-mean", fipo::Aggregation::kSeqMeanTokenMean);
  aggregation("seq-mean-token-sum-norm", fipo::Aggregation::kSeqMeanTokenSumNorm);
  module.attr("AGGREGATIONS") = aggregations;
  module.attr("SAFE_CLIP") = py::make_tuple(fipo::kSafeLow, fipo::kSafeHigh);
  module.attr("MAX_LOG_WEIGHT") = fipo::kMaxLogWeight;
  module.attr("HISTOGRAM_RANGE") = fipo::kHistogramRange;
  module.attr("HISTOGRAM_BINS_PER_NAT") = fipo::kHistogramBinsPerNat;
}

}  // namespace

PYBIND11_MODULE(_extension, module) {
  module.doc() = "Compiled kernels of FIPO; use megatron_fipo.ops instead.";
  bind_inputs(module);
  bind_outputs(module);
  bind_lm_head(module);
  bind_metrics(module);
  bind_constants(module);

  module.attr("BUILD") = MEGATRON_FIPO_BUILD;
  module.def("cpu_isa", &fipo::cpu_isa);
  module.def(
      "scan_cpu",
      [](const fipo::Tokens& tokens, const fipo::Constants& constants, Address carry_in, const fipo::ScanOutput& out,
         int threads) { fipo::scan_cpu(tokens, constants, pointer<const float>(carry_in), out, threads); },
      py::call_guard<py::gil_scoped_release>(), "tokens"_a, "constants"_a, "carry_in"_a, "out"_a, "threads"_a);
  module.def("loss_cpu", &fipo::loss_cpu, py::call_guard<py::gil_scoped_release>(), "tokens"_a, "constants"_a,
             "shard"_a, "out"_a, "threads"_a);
  module.attr("LOGIT_ALIGNMENT") = fipo::kLogitAlignment;
  module.def("logit_statistics_cpu", &fipo::logit_statistics_cpu, py::call_guard<py::gil_scoped_release>(),
             "logits"_a, "out"_a, "threads"_a);
  module.def("logit_gradient_cpu", &fipo::logit_gradient_cpu, py::call_guard<py::gil_scoped_release>(), "logits"_a,
             "out"_a, "threads"_a);

#ifdef MEGATRON_FIPO_CUDA
  module.attr("HAS_CUDA") = true;
  module.def("scan_cuda_workspace", &fipo::scan_cuda_workspace);
  module.def("loss_cuda_workspace", &fipo::loss_cuda_workspace);
  module.def(
      "scan_cuda",
      [](const fipo::Tokens& tokens, const fipo::Constants& constants, Address carry_in, const fipo::ScanOutput& out,
         Address workspace, Address stream) {
        fipo::scan_cuda(tokens, constants, pointer<const float>(carry_in), out, pointer<void>(workspace),
                        pointer<void>(stream));
      },
      py::call_guard<py::gil_scoped_release>(), "tokens"_a, "constants"_a, "carry_in"_a, "out"_a, "workspace"_a,
      "stream"_a);
  module.def(
      "loss_cuda",
      [](const fipo::Tokens& tokens, const fipo::Constants& constants, const fipo::Shard& shard,
         const fipo::LossOutput& out, Address workspace, Address stream) {
        fipo::loss_cuda(tokens, constants, shard, out, pointer<void>(workspace), pointer<void>(stream));
      },
      py::call_guard<py::gil_scoped_release>(), "tokens"_a, "constants"_a, "shard"_a, "out"_a, "workspace"_a,
      "stream"_a);
  module.def(
      "logit_statistics_cuda",
      [](const fipo::Logits& logits, const fipo::LogitStatistics& out, Address stream) {
        fipo::logit_statistics_cuda(logits, out, pointer<void>(stream));
      },
      py::call_guard<py::gil_scoped_release>(), "logits"_a, "out"_a, "stream"_a);
  module.def(
      "logit_gradient_cuda",
      [](const fipo::Logits& logits, const fipo::LogitGradient& out, Address stream) {
        fipo::logit_gradient_cuda(logits, out, pointer<void>(stream));
      },
      py::call_guard<py::gil_scoped_release>(), "logits"_a, "out"_a, "stream"_a);
#else
  module.attr("HAS_CUDA") = false;
#endif
}
