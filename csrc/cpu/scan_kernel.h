// The Future-KL scan of one piece, from its end to its start.
#pragma once

#include "kernel_common.h"

namespace {

class ScanPiece {
 public:
  ScanPiece(const ScanJob& job, const Piece& piece)
      : job_(job),
        clamp_(Lanes::set(job.log_ratio_clamp)),
        log_dual_clip_(Lanes::set(job.log_dual_clip)),
        to_end_(load_to_end(job.decay)),
        carry_(piece.carry),
        advantage_(Lanes::set(0.0f)) {
    if (job.count && !job.tokens.advantages_per_token && job.tokens.advantages)
      advantage_ = Lanes::set(job.tokens.advantages[piece.segment]);
  }

  template <bool kCount>
  PieceSummary run(const Piece& piece) {
    Window all = window_of(job_.tokens);
    all.future_kl = job_.future_kl;
    int64_t end = piece.end;
    for (; end - piece.begin >= kWidth; end -= kWidth) step<kCount>(all.at(end - kWidth));
    if (end > piece.begin) {
      Edge edge(all.at(piece.begin), static_cast<int>(end - piece.begin));
      step<kCount>(edge.window());
      edge.write_back();
      carry_ = edge.first_future_kl();
    }
    return {carry_, dual_clipped_, loss_tokens_};
  }

 private:
  template <bool kCount>
  FIPO_INLINE void step(const Window& window) {
    const Shift shift = load_shift(window, clamp_, log_dual_clip_);
    const F future_kl = scan_window(shift, job_.decay, to_end_, &carry_);
    if (window.future_kl) Lanes::store(window.future_kl, future_kl);
    if (kCount) {
      loss_tokens_ += Lanes::count(shift.mask);
      const F advantage = window.advantages ? Lanes::load(window.advantages) : advantage_;
      dual_clipped_ += Lanes::count(Lanes::bit_and(shift.above_dual_clip, Lanes::less(advantage, Lanes::set(0.0f))));
    }
  }

  const ScanJob& job_;
  const F clamp_, log_dual_clip_, to_end_;
  double carry_;
  F advantage_;
  int64_t dual_clipped_ = 0, loss_tokens_ = 0;
};

PieceSummary scan_piece(const ScanJob& job, const Piece& piece) {
  ScanPiece scan(job, piece);
  return job.count ? scan.run<true>(piece) : scan.run<false>(piece);
}

}  // namespace
