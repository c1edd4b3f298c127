// See places.h.
#include "patch_match/places.h"

#include <algorithm>
#include <utility>

#include "common/parallel.h"

namespace hdrops::patch_match {

Places::Places(const int64_t* index, int64_t batch, int64_t query_height, int64_t query_width, int64_t key_height,
               int64_t key_width)
    : height_(query_height),
      width_(query_width),
      memory_(batch * query_height * query_width * int64_t(sizeof(Place))),
      places_(static_cast<Place*>(memory_.data())) {
  const int64_t last = key_height * key_width - 1;
  parallel_for(batch * query_height * query_width, 1 << 15, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t at = std::clamp<int64_t>(index[i], 0, last), y = at / key_width;
      places_[i] = {int32_t(y), int32_t(at - y * key_width)};
    }
  });
}

InversePlaces::InversePlaces(const Places& places, int64_t batch, int64_t query_height, int64_t query_width,
                             int64_t key_height, int64_t key_width)
    : key_width_(key_width),
      pixels_(key_height * key_width),
      sites_per_image_(query_height * query_width),
      first_memory_(batch * (pixels_ + 1) * int64_t(sizeof(int64_t))),
      ways_memory_(batch * sites_per_image_ * int64_t(sizeof(Place))),
      first_(static_cast<int64_t*>(first_memory_.data())),
      ways_(static_cast<Place*>(ways_memory_.data())) {
  // A counting sort of each image's sites by their match.
  parallel_for(batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t image = begin; image < end; ++image) {
      int64_t* first = first_ + image * (pixels_ + 1);
      Place* ways = ways_ + image * sites_per_image_;
      const Place* match = places.row(image, 0);
      std::fill(first, first + pixels_ + 1, int64_t(0));
      for (int64_t i = 0; i < sites_per_image_; ++i) ++first[match[i].y * key_width + match[i].x];
      for (int64_t pixel = 0, before = 0; pixel <= pixels_; ++pixel) before += std::exchange(first[pixel], before);
      for (int64_t y = 0; y < query_height; ++y) {
        for (int64_t x = 0; x < query_width; ++x, ++match) {
          ways[first[match->y * key_width + match->x]++] = {int32_t(y) - match->y, int32_t(x) - match->x};
        }
      }
      // Every entry now is the end of its pixel, which is the begin of the next.
      std::copy_backward(first, first + pixels_, first + pixels_ + 1);
      first[0] = 0;
    }
  });
}

}  // namespace hdrops::patch_match
