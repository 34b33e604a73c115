// What the compiled recurrent operators say to derivatives in forward mode.
#pragma once

#include <torch/csrc/autograd/functions/utils.h>

namespace layernorm {

inline void refuse_forward_mode(const torch::autograd::variable_list& arguments) {
  for (const auto& argument : arguments)
    TORCH_CHECK_NOT_IMPLEMENTED(!torch::autograd::isFwGradDefined(argument),
                                "layernorm: the compiled recurrent kernels have no forward-mode "
                                "derivative; use layernorm.backends.use(\"reference\")");
}

}  // namespace layernorm
