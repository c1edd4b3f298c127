// How an image [N, C, P] in memory meets its curves, for the kernels that look curves up or keep sums per curve.
//
// A group is a set of pixels that share a table: all pixels of one curve (planar memory), or of the C curves of an
// image whose channels are interleaved (channels last); `width` is the number of curves in its table. A group's pixels
// are numbered through its rows, each a contiguous piece of memory, so that they can be cut into equal parts.
#pragma once
#include "common/hd.h"

namespace hdrops {

struct CurveLayout {
  int64_t groups, width;     // groups * width curves, in the order of the curve tensor
  int64_t rows, row_length;  // of a group
  int64_t row_stride;        // between a group's rows in memory; group k begins at k * row_length

  HDROPS_HD int64_t length() const { return rows * row_length; }
};

// Image [n, c, p], interleaved (channels last) or planar; curve [curve_n, curve_c, levels], each n or 1, c or 1.
inline CurveLayout curve_layout(int64_t n, int64_t c, int64_t p, bool interleaved, int64_t curve_n, int64_t curve_c) {
  bool per_image = curve_n > 1, per_channel = curve_c > 1;
  if (!per_channel) return per_image ? CurveLayout{n, 1, 1, c * p, 0} : CurveLayout{1, 1, 1, n * c * p, 0};
  if (interleaved) return per_image ? CurveLayout{n, c, 1, c * p, 0} : CurveLayout{1, c, 1, n * c * p, 0};
  return per_image ? CurveLayout{n * c, 1, 1, p, 0} : CurveLayout{c, 1, n, p, c * p};
}

// A contiguous run of a group's pixels: where it begins in memory, which curve its first pixel takes, how long it is.
struct Run {
  int64_t offset, channel, count;
};

// The run that begins at a group's pixel `begin` and ends with its row, or at pixel `end`.
HDROPS_HD Run run_at(const CurveLayout& layout, int64_t group, int64_t begin, int64_t end) {
  int64_t row = begin / layout.row_length, column = begin % layout.row_length;
  int64_t left = layout.row_length - column, wanted = end - begin;
  int64_t offset = group * layout.row_length + row * layout.row_stride + column;
  return {offset, column % layout.width, wanted < left ? wanted : left};
}

// The parts every group is cut into, by shape alone: what is summed per part and then over the parts in order is the
// same for any number of threads.
struct Parts {
  int64_t per_group, length;  // length: of a group

  // Parts a thread should have at least, so that a small image does not wake the others.
  int64_t grain() const { return 1 + 16384 / (1 + length / per_group); }
  HDROPS_HD int64_t begin(int64_t part) const { return length / per_group * part + min(length % per_group, part); }
  HDROPS_HD static int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
};

// Parts of at least `least` pixels (but for a group's only one), at most `most` in all (but one a group).
inline Parts cut(const CurveLayout& layout, int64_t least, int64_t most) {
  int64_t wanted = layout.length() / least, allowed = layout.groups > 0 ? most / layout.groups : 1;
  int64_t per_group = Parts::min(wanted, allowed);
  return {per_group < 1 ? 1 : per_group, layout.length()};
}

}  // namespace hdrops
