// Matches as coordinates, and their inverse: which sites of the query have a given match.
#pragma once
#include <cstdint>

#include "common/memory.h"

namespace hdrops::patch_match {

struct Place {
  int32_t y, x;
};

// The matches of all images as coordinates, clamped to the key's grid.
class Places {
 public:
  Places(const int64_t* index, int64_t batch, int64_t query_height, int64_t query_width, int64_t key_height,
         int64_t key_width);
  // Of the first site of a row.
  const Place* row(int64_t image, int64_t y) const { return places_ + (image * height_ + y) * width_; }

 private:
  int64_t height_, width_;
  Buffer memory_;
  Place* places_;
};

// Ways from a match to the sites that have it: site minus match, along y and x.
struct WayRange {
  const Place *begin, *end;
};

// For every pixel of the key the ways to the sites of the query that match it, in the order of the sites.
class InversePlaces {
 public:
  InversePlaces(const Places& places, int64_t batch, int64_t query_height, int64_t query_width, int64_t key_height,
                int64_t key_width);
  // Of the pixels from (y, left) to (y, right), one after the other.
  WayRange to(int64_t image, int64_t y, int64_t left, int64_t right) const {
    const int64_t* first = first_ + image * (pixels_ + 1) + y * key_width_;
    const Place* ways = ways_ + image * sites_per_image_;
    return {ways + first[left], ways + first[right + 1]};
  }

 private:
  int64_t key_width_, pixels_, sites_per_image_;
  Buffer first_memory_, ways_memory_;
  int64_t* first_;  // per image, of each pixel and of the end, its first way
  Place* ways_;
};

}  // namespace hdrops::patch_match
