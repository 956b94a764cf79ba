// A warp's range of one segment in registers, up to kRows rows of kRowTokens tokens: reading, scanning, writing.
#pragma once

#include "exchange.cuh"

namespace fipo {
namespace cuda {

template <class T>
struct alignas(kQuad * sizeof(T)) Quad {
  T at[kQuad];
};

// Positions of one lane's quads: row r's is at position + r kRowTokens, a multiple of kQuad.
struct Window {
  int64_t position;
  int begin, end;  // of the segment, relative to `position`; any value beyond the rows if it is further away
  int rows;        // in use, equal in all lanes
  bool vectors;    // whole quads may be read: pointers are aligned and no quad in use ends after the last token

  __device__ bool holds(int row) const { return row < rows && row * kRowTokens < end; }

  // Bit r kQuad + i: token i of row r is in the segment.
  template <int rows_held>
  __device__ uint32_t inside() const {
    uint32_t bits = 0;
#pragma unroll
    for (int r = 0; r < rows_held; ++r)
      if (holds(r)) bits |= first_bits(end - r * kRowTokens) << (r * kQuad);
    return bits & ~first_bits(begin);
  }

 private:
  __device__ static uint32_t first_bits(int count) {
    return count >= kQuad ? (1u << kQuad) - 1 : count <= 0 ? 0 : (1u << count) - 1;
  }
};

// Zero without a token. A quad's tokens before `begin` are read, although they belong to another segment.
template <class T>
__device__ Quad<T> read_quad(const T* from, const Window& window, int row) {
  Quad<T> quad = {};
  if (!window.holds(row)) return quad;
  const T* const at = from + window.position + row * kRowTokens;
  if (window.vectors) return *reinterpret_cast<const Quad<T>*>(at);
#pragma unroll
  for (int i = 0; i < kQuad; ++i)
    if (row * kRowTokens + i < window.end) quad.at[i] = at[i];
  return quad;
}

// One lane's quad of a row, ready for use. Bit i: token i.
struct Row {
  int index;
  uint32_t inside, mask, clamped;  // as in Tile
  Quad<float> log_ratio, future_kl;
};

// Writes the row's tokens that are in the segment.
__device__ inline void write_quad(float* to, const Window& window, const Row& row, const Quad<float>& quad) {
  float* const at = to + window.position + row.index * kRowTokens;
  if (window.vectors && row.inside == (1u << kQuad) - 1) {
    *reinterpret_cast<Quad<float>*>(at) = quad;
    return;
  }
#pragma unroll
  for (int i = 0; i < kQuad; ++i)
    if (row.inside >> i & 1) at[i] = quad.at[i];
}

__device__ inline float as_float(float value) { return value; }
__device__ inline float as_float(uint16_t bfloat16) { return __uint_as_float(static_cast<uint32_t>(bfloat16) << 16); }

template <class T, int rows>
__device__ void read_rows(const void* from, const Window& window, Quad<float> (&to)[rows]) {
  Quad<T> raw[rows];
#pragma unroll
  for (int r = 0; r < rows; ++r) raw[r] = read_quad(static_cast<const T*>(from), window, r);
#pragma unroll
  for (int r = 0; r < rows; ++r)
#pragma unroll
    for (int i = 0; i < kQuad; ++i) to[r].at[i] = as_float(raw[r].at[i]);
}

template <int rows>
__device__ void read_rows(const void* from, Float dtype, const Window& window, Quad<float> (&to)[rows]) {
  if (dtype == Float::kBFloat16)
    read_rows<uint16_t>(from, window, to);
  else
    read_rows<float>(from, window, to);
}

// Keeps NaN.
__device__ inline float clip(float value, float low, float high) {
  return value < low ? low : value > high ? high : value;
}

template <class Shape>
class Tile {
 public:
  // The bits below: r kQuad + i for token i of row r.
  Window window;
  uint32_t inside;   // of the segment
  uint32_t mask;     // loss tokens
  uint32_t above_dual_clip;  // those above the dual clip
  uint32_t clamped;  // with a clamped log-ratio
  Quad<float> log_ratio[Shape::kRows];  // d, clamped; any value if not a loss token

  // `carry_in` is S of the token after the segment. It enters as the term of a token there, so that the scan
  // does not depend on the distance to the end of the range.
  __device__ void load(const Tokens& tokens, const Constants& constants, const Window& at, float carry_in) {
    window = at;
    inside = window.template inside<Shape::kRows>();
    Quad<uint8_t> is_loss[Shape::kRows];
    Quad<float> old[Shape::kRows];
#pragma unroll
    for (int r = 0; r < Shape::kRows; ++r) is_loss[r] = read_quad(tokens.mask, window, r);
    read_rows(tokens.log_probs, tokens.dtype, window, log_ratio);
    if (tokens.old_log_probs) read_rows(tokens.old_log_probs, tokens.dtype, window, old);

    mask = above_dual_clip = clamped = 0;
#pragma unroll
    for (int r = 0; r < Shape::kRows; ++r)
#pragma unroll
      for (int i = 0; i < kQuad; ++i) {
        const uint32_t bit = 1u << (r * kQuad + i);
        const float shift = tokens.old_log_probs ? log_ratio[r].at[i] - old[r].at[i] : log_ratio[r].at[i];
        log_ratio[r].at[i] = clip(shift, -constants.log_ratio_clamp, constants.log_ratio_clamp);
        if (is_loss[r].at[i]) mask |= bit;
        if (log_ratio[r].at[i] > constants.log_dual_clip) above_dual_clip |= bit;
        if (fabsf(shift) > constants.log_ratio_clamp) clamped |= bit;
      }
    mask &= inside;
    above_dual_clip &= mask;
    scanned_ = constants.influence ? mask & ~above_dual_clip : 0;
    if (carry_in != 0.0f) take_in(carry_in);
  }

  // Loss tokens above the dual clip with A < 0.
  __device__ uint32_t dual_clipped(const Tokens& tokens, float segment_advantage) const {
    if (!tokens.advantages) return 0;  // not requested
    if (!tokens.advantages_per_token) return segment_advantage < 0.0f ? above_dual_clip : 0;
    uint32_t bits = 0;
    for (uint32_t left = above_dual_clip; left; left &= left - 1) {  // usually there is none
      const int at = __ffs(left) - 1;
      if (tokens.advantages[window.position + at / kQuad * kRowTokens + at % kQuad] < 0.0f) bits |= 1u << at;
    }
    return bits;
  }

  // S of the range's first token, with carry 0. Keeps what `future_kl` needs.
  __device__ float scan(const Decay<Shape>& decay, int lane) {
    float first = 0.0f;
#pragma unroll
    for (int r = Shape::kRows - 1; r >= 0; --r) {
      if (r >= window.rows) continue;
      float sum = 0.0f;
#pragma unroll
      for (int i = kQuad - 1; i >= 0; --i) sum = fmaf(decay.token, sum, term(r, i));
      from_lane_[r] = row_scan(sum, decay, lane);
      first = fmaf(decay.row, first, __shfl_sync(kAllLanes, from_lane_[r], 0));
    }
    return first;
  }

  // Calls visit(row) from the last row to the first, given S of the token after the range, and gamma^n over the n
  // tokens after this lane's quad in its row. This consumes the tile: registers have no addresses, and a copy of
  // `visit` for each row would be too much code, so the current row is always the last one, and the others move up.
  template <class Visit>
  __device__ void for_each_row(const Decay<Shape>& decay, int lane, float behind_lane, float carry, Visit visit) {
    constexpr int last = Shape::kRows - 1, shift = last * kQuad;
#pragma unroll 1
    for (int r = last; r >= 0; --r) {
      if (r < window.rows) {
        const float right = __shfl_down_sync(kAllLanes, from_lane_[last], 1);
        float sum = fmaf(behind_lane, carry, lane == kLanes - 1 ? 0.0f : right);
        Row row = {r, inside >> shift, mask >> shift, clamped >> shift, log_ratio[last], {}};
#pragma unroll
        for (int i = kQuad - 1; i >= 0; --i) row.future_kl.at[i] = sum = fmaf(decay.token, sum, term(last, i));
        carry = fmaf(decay.row, carry, __shfl_sync(kAllLanes, from_lane_[last], 0));
        visit(row);
      }
      move_up();
    }
  }

 private:
  __device__ float term(int row, int i) const {
    return scanned_ >> (row * kQuad + i) & 1 ? log_ratio[row].at[i] : 0.0f;
  }

  // Sum over this lane's quad and all after it in the row, given each lane's own.
  __device__ static float row_scan(float sum, const Decay<Shape>& decay, int lane) {
#pragma unroll
    for (int i = 0; i < 5; ++i) {
      const float ahead = __shfl_down_sync(kAllLanes, sum, 1 << i);
      if (lane + (1 << i) < kLanes) sum = fmaf(decay.quads[i], ahead, sum);
    }
    return sum;
  }

  __device__ void take_in(float carry_in) {
    const int at = window.end;
    if (at < 0 || at >= window.rows * kRowTokens || at % kRowTokens >= kQuad) return;  // belongs to another lane
    const int index = at / kRowTokens * kQuad + at % kRowTokens;
    scanned_ |= 1u << index;
#pragma unroll
    for (int r = 0; r < Shape::kRows; ++r)  // registers have no addresses: search
#pragma unroll
      for (int i = 0; i < kQuad; ++i)
        if (r * kQuad + i == index) log_ratio[r].at[i] = carry_in;
  }

  __device__ void move_up() {
#pragma unroll
    for (int r = Shape::kRows - 1; r > 0; --r) {
      log_ratio[r] = log_ratio[r - 1];
      from_lane_[r] = from_lane_[r - 1];
    }
    inside = up(inside);
    mask = up(mask);
    clamped = up(clamped);
    scanned_ = up(scanned_);
  }
  __device__ static uint32_t up(uint32_t bits) { return bits << kQuad & kAllBits; }

  static constexpr uint32_t kAllBits = (1ull << (Shape::kRows * kQuad)) - 1;
  uint32_t scanned_;  // log-ratio enters S
  float from_lane_[Shape::kRows];  // S of this lane's first token in each row, with carry 0 after the row
};

}  // namespace cuda
}  // namespace fipo
