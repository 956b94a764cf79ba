#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernels.h"

namespace fipo {
namespace {

struct Isa {
  const char* name;
  const cpu::Kernels* kernels;
  bool available;
};

Isa choose() {
#ifdef __x86_64__
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const Isa all[] = {{"avx512", &cpu::kAvx512Kernels, avx512},
                     {"avx2", &cpu::kAvx2Kernels, avx2},
                     {"scalar", &cpu::kScalarKernels, true}};
#else
  const Isa all[] = {{"scalar", &cpu::kScalarKernels, true}};
#endif
  const char* wanted = getenv("MEGATRON_FIPO_ISA");
  for (const Isa& isa : all)
    if (isa.available && (!wanted || !*wanted || strcmp(wanted, isa.name) == 0)) return isa;
  return {nullptr, nullptr, false};
}

const Isa& chosen() {
  static const Isa isa = choose();
  return isa;
}

}  // namespace

const char* cpu_isa() { return chosen().name; }

namespace cpu {

const Kernels& kernels() { return *chosen().kernels; }

Decay make_decay(double half_life) {
  const auto exact = [half_life](int tokens) { return exp2(-tokens / half_life); };
  const auto power = [&exact](int tokens) { return static_cast<float>(exact(tokens)); };
  Decay decay = {power(1), power(2), power(4), power(8), {}, {}};
  for (int i = 0; i < kMaxLanes; ++i) decay.to_end[i] = power(kMaxLanes - i);
  for (int i = 0; i <= kMaxLanes; ++i) decay.by_window[i] = exact(i);
  return decay;
}

}  // namespace cpu
}  // namespace fipo
