#include "lanes_scalar.h"
// Lanes first: the kernels are written in terms of them.
#include "lm_head_kernel.h"
#include "loss_kernel.h"
#include "scan_kernel.h"

const fipo::cpu::Kernels fipo::cpu::kScalarKernels = {scan_piece, loss_run, logit_statistics_row,
                                                      logit_gradient_row};
