// A block-sparse matrix as a dense one.
#pragma once

#include "kernels.h"

namespace blockprune {

// Fill layer.y [out_features, in_features], elements of `element` bytes, with the blocks and with zeros between them.
// Takes indices that were checked.
void unpack(const Layer& layer, int64_t in_features, int64_t element, int32_t num_threads);

}  // namespace blockprune
