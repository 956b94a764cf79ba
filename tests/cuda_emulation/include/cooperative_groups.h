// Thread-block clusters for the emulation: a block's shared memory is its host thread's thread-local storage, where
// everything has the same place relative to the anchor.
#pragma once

#include <cuda_runtime.h>

namespace cooperative_groups {

struct cluster_group {
  void sync() const { emulation::current->block->meet_cluster(); }

  template <class T>
  T* map_shared_rank(T* shared, int rank) const {
    const ptrdiff_t distance = reinterpret_cast<char*>(shared) - &emulation::anchor;
    return reinterpret_cast<T*>(emulation::current->block->cluster.anchors[rank] + distance);
  }
};

inline cluster_group this_cluster() { return {}; }

}  // namespace cooperative_groups
