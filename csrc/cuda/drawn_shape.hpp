// How many blocks take a request of drawn drafts, and how many help to read.
#pragma once

#include "cuda/chain_args.hpp"
#include "cuda/launch.hpp"

namespace foretoken::cuda {

// One cluster for each request, which reads `own` of kWholeShare of its rows and goes on with it; the rest is
// dealt out among `helpers` more clusters, in the order of the requests.
struct DrawnShape {
  int cluster = 1, helpers = 0;
  int32_t own = kWholeShare;
};

// Requests that a helper reads of, at most.
inline int64_t requests_of_helper(int64_t requests, int64_t helpers) {
  if (helpers % requests == 0) return 1;
  return requests % helpers == 0 ? requests / helpers : requests / helpers + 2;
}

// The weights are times measured on an H200, in us; kOfStart: until it is known which rows a request has.
inline DrawnShape find_drawn_shape(const ClusterRoom& room, int64_t requests, int64_t rows, int64_t tiles,
                                   bool may_share) {
  constexpr double kOfTile = 0.11, kOfTilePair = 0.19, kOfStart = 3.0, kOfSharing = 1.2, kPasses = 5.0;
  constexpr int64_t kMostOfHelper = 16;
  DrawnShape best;
  double least = 1e30;
  for (int cluster = 1; cluster <= kMaxCluster; ++cluster) {
    const int64_t fit = room.clusters[cluster];
    if (cluster > 1 && (fit < requests || (cluster - 1) * kWarps >= rows * tiles)) continue;
    const double reading = kOfTile * static_cast<double>(rows * tiles) / cluster;
    const double passes = kPasses * kOfTilePair * static_cast<double>(tiles) / cluster;
    const int64_t most = may_share ? std::max<int64_t>(0, fit - requests) : 0;
    for (int64_t helpers = 0; helpers <= most; ++helpers) {
      double own = 1.0;
      if (helpers > 0) {
        const int64_t of_helper = requests_of_helper(requests, helpers);
        if (of_helper > kMostOfHelper) continue;
        // Both are through at the same time.
        const double each = static_cast<double>(requests) / static_cast<double>(helpers);
        const double later = kOfStart * static_cast<double>(of_helper - 1) / reading;
        own = std::min(1.0, (each + later) / (1.0 + each));
      }
      const double cost = own * reading + passes + (helpers > 0 ? kOfSharing : 0.0);
      if (cost >= least) continue;
      least = cost;
      best = {cluster, static_cast<int>(helpers), static_cast<int32_t>(own * kWholeShare + 0.5)};
    }
  }
  return best;
}

}  // namespace foretoken::cuda
