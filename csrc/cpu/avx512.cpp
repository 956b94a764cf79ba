#include "lanes_avx512.h"
// Lanes first: the kernels are written in terms of them.
#include "lm_head_kernel.h"
#include "loss_kernel.h"
#include "scan_kernel.h"

const fipo::cpu::Kernels fipo::cpu::kAvx512Kernels = {scan_piece, loss_run, logit_statistics_row,
                                                      logit_gradient_row};
