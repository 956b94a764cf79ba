// Loss of one token: steps 4 to 7 of the algorithm (arXiv 2603.19835, eq. 6 to 8).
#pragma once

#include "tile.cuh"

namespace fipo {
namespace cuda {

// f_t.
__device__ inline float influence_weight(float raw, float advantage, float ratio, const Constants& constants) {
  const float weight = clip(raw, constants.influence_low, constants.influence_high);  // raw may be inf
  return advantage < 0.0f && ratio > constants.safety_threshold ? clip(weight, kSafeLow, kSafeHigh) : weight;
}

struct Surrogate {
  float loss;        // l_t
  float derivative;  // by logp_t; 0 where a clip is active
  bool is_clipped;   // by the upper or lower ratio clip
};

__device__ inline Surrogate surrogate(float weighted_advantage, float ratio, const Constants& constants) {
  const float plain = -weighted_advantage * ratio;
  const float clipped = -weighted_advantage * clip(ratio, constants.ratio_low, constants.ratio_high);
  const float bound = -weighted_advantage * constants.dual_clip;
  const bool is_clipped = clipped > plain;
  const float loss = is_clipped ? clipped : plain;
  const bool is_bounded = weighted_advantage < 0.0f && loss > bound;
  return {is_bounded ? bound : loss, is_clipped || is_bounded ? 0.0f : plain, is_clipped};
}

}  // namespace cuda
}  // namespace fipo
