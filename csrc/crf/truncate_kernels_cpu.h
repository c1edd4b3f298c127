// The truncation process (OP-14), forward and backward. Compiled per instruction set.
//
// Rows stream through: a row of each stage is computed as soon as the rows of the stage before that its box spans are
// there, and only the last few rows of each stage are kept. A box is summed down the columns and then along the row,
// anew for every pixel, never by adding the next and taking away the last: in an image of high dynamic range what a
// bright pixel leaves behind in a running sum would drown its dark neighbours. For the same reason everything is in
// double: E[H^2] - E[H]^2 of bright pixels has no digits of eps left in float.
//
// The transpose of a box with reflected borders is the box over zeros outside, whose values outside are then folded
// back in; down the columns that makes some rows count twice.
namespace hdrops {
namespace HDROPS_ISA {

template <class T>
void read_row(const T* source, double* target, int64_t count) {
  for (int64_t i = 0; i < count; ++i) target[i] = double(widen(source[i]));
}

template <class T>
void write_row(const double* source, T* target, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    if constexpr (sizeof(T) == 8) {
      target[i] = source[i];
    } else {
      narrow(float(source[i]), target + i);
    }
  }
}

HDROPS_HD int64_t reflect(int64_t at, int64_t size) {
  at = at < 0 ? -at : at;
  return at < size ? at : 2 * (size - 1) - at;
}

// Rows under a box around y; their number.
inline int64_t box_rows(const RowRing& ring, int64_t y, const TruncateParams& p, const double** rows) {
  for (int64_t d = -p.radius; d <= p.radius; ++d) *rows++ = ring.row(reflect(y + d, p.height));
  return 2 * p.radius + 1;
}

// Rows whose boxes y is under, as often as it is.
inline int64_t transposed_box_rows(const RowRing& ring, int64_t y, const TruncateParams& p, const double** rows) {
  const int64_t last = p.height - 1, mirrored[] = {y, -y, 2 * last - y};
  int64_t count = 0;
  for (int k = 0; k < 3; ++k) {
    const int64_t at = mirrored[k];
    if (k > 0 && (at == y || at < -p.radius || at > last + p.radius)) continue;
    for (int64_t d = -p.radius; d <= p.radius; ++d) {
      if (at + d >= 0 && at + d <= last) rows[count++] = ring.row(at + d);
    }
  }
  return count;
}

template <int N>
HDROPS_HD void sum_rows(const double* const* rows, int64_t count, int64_t i, double* sums) {
  vec<double, N> sum = load<N>(rows[0] + i);
  for (int64_t k = 1; k < count; ++k) sum += load<N>(rows[k] + i);
  store<N>(sums + i, sum);
}

// Sums down the columns.
inline void column_sums(const double* const* rows, int64_t count, int64_t size, double* sums) {
  constexpr int N = kLanes<double>;
  int64_t i = 0;
  for (; i + N <= size; i += N) sum_rows<N>(rows, count, i, sums);
  for (; i < size; ++i) sum_rows<1>(rows, count, i, sums);
}

template <int N>
HDROPS_HD void sum_rows_and_squares(const double* const* rows, int64_t count, int64_t i, double* sums,
                                    double* squares) {
  vec<double, N> sum = splat<N>(0.0), square = sum;
  for (int64_t k = 0; k < count; ++k) {
    vec<double, N> value = load<N>(rows[k] + i);
    sum += value;
    square += value * value;
  }
  store<N>(sums + i, sum);
  store<N>(squares + i, square);
}

inline void column_sums_and_squares(const double* const* rows, int64_t count, int64_t size, double* sums,
                                    double* squares) {
  constexpr int N = kLanes<double>;
  int64_t i = 0;
  for (; i + N <= size; i += N) sum_rows_and_squares<N>(rows, count, i, sums, squares);
  for (; i < size; ++i) sum_rows_and_squares<1>(rows, count, i, sums, squares);
}

template <int N>
HDROPS_HD void sum_window(const double* columns, int64_t i, const TruncateParams& p, double scale, double* sums) {
  vec<double, N> sum = load<N>(columns + i - p.radius * p.step);
  for (int64_t d = 1 - p.radius; d <= p.radius; ++d) sum += load<N>(columns + i + d * p.step);
  store<N>(sums + i, sum * scale);
}

// Means along the row for i in [begin, end), from column sums that reach a radius further.
inline void window_means(const double* columns, int64_t begin, int64_t end, const TruncateParams& p, double* means) {
  constexpr int N = kLanes<double>;
  const double side = double(2 * p.radius + 1), scale = 1 / (side * side);
  int64_t i = begin;
  for (; i + N <= end; i += N) sum_window<N>(columns, i, p, scale, means);
  for (; i < end; ++i) sum_window<1>(columns, i, p, scale, means);
}

// Box means from column sums, whose row starts at `columns`; what lies outside is reflected.
inline void box_means(double* columns, const TruncateParams& p, double* means) {
  for (int64_t d = 1; d <= p.radius; ++d) {
    for (int64_t c = 0; c < p.step; ++c) {
      columns[c - d * p.step] = columns[c + d * p.step];
      columns[c + (p.width - 1 + d) * p.step] = columns[c + (p.width - 1 - d) * p.step];
    }
  }
  window_means(columns, 0, p.row(), p, means);
}

// The transpose of box_means along the row.
inline void transposed_box_means(double* columns, const TruncateParams& p, double* means) {
  const int64_t margin = p.radius * p.step, last = p.width - 1;
  for (int64_t i = 1; i <= 2 * margin; ++i) columns[-i] = columns[p.row() - 1 + i] = 0;
  window_means(columns, -margin, p.row() + margin, p, means);
  for (int64_t d = 1; d <= p.radius; ++d) {
    for (int64_t c = 0; c < p.step; ++c) {
      means[c + d * p.step] += means[c - d * p.step];
      means[c + (last - d) * p.step] += means[c + (last + d) * p.step];
    }
  }
}

// One plane's rows on their way through the stages.
template <class T>
struct TruncateStream {
  const TruncateParams& p;
  TruncateWorkspace& ws;
  const T* input;
  const T* grad_output;
  double *first_columns, *second_columns;  // where a row starts between its margins
  double *first_means, *second_means;
};

template <class T>
void need_image(TruncateStream<T>& s, int64_t last) {
  RowRing& image = s.ws.image;
  for (; image.next <= last && image.next < s.p.height; ++image.next) {
    read_row(s.input + image.next * s.p.row(), image.row(image.next), s.p.row());
  }
}

inline void guide(const double* mean, const double* square, double eps, int64_t count, double* slope, double* shift) {
  for (int64_t i = 0; i < count; ++i) {
    double variance = square[i] - mean[i] * mean[i];
    slope[i] = variance / (variance + eps);
    shift[i] = mean[i] - slope[i] * mean[i];
  }
}

inline void keep_guide(const double* mean, const double* square, double eps, int64_t count, double* kept_mean,
                       double* inverse) {
  for (int64_t i = 0; i < count; ++i) {
    kept_mean[i] = mean[i];
    inverse[i] = 1 / (square[i] - mean[i] * mean[i] + eps);
  }
}

// a and b of rows up to `last`; for the backward pass also m and 1 / (v + eps).
template <class T>
void need_guide(TruncateStream<T>& s, int64_t last) {
  const TruncateParams& p = s.p;
  for (int64_t& y = s.ws.slope.next; y <= last && y < p.height; ++y) {
    need_image(s, y + p.radius);
    const int64_t count = box_rows(s.ws.image, y, p, s.ws.rows);
    column_sums_and_squares(s.ws.rows, count, p.row(), s.first_columns, s.second_columns);
    box_means(s.first_columns, p, s.first_means);
    box_means(s.second_columns, p, s.second_means);
    guide(s.first_means, s.second_means, p.eps, p.row(), s.ws.slope.row(y), s.ws.shift.row(y));
    if (s.grad_output != nullptr) {
      keep_guide(s.first_means, s.second_means, p.eps, p.row(), s.ws.mean.row(y), s.ws.inverse.row(y));
    }
  }
}

// Box means of a and b at row y, in first_means and second_means.
template <class T>
void filter_row(TruncateStream<T>& s, int64_t y) {
  need_guide(s, y + s.p.radius);
  const RowRing* guides[] = {&s.ws.slope, &s.ws.shift};
  double* columns[] = {s.first_columns, s.second_columns};
  double* means[] = {s.first_means, s.second_means};
  for (int k = 0; k < 2; ++k) {
    const int64_t count = box_rows(*guides[k], y, s.p, s.ws.rows);
    column_sums(s.ws.rows, count, s.p.row(), columns[k]);
    box_means(columns[k], s.p, means[k]);
  }
}

inline void limit_bases(const double* image, double* slope_then_result, const double* shift, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    slope_then_result[i] = limit_base(image[i], slope_then_result[i] * image[i] + shift[i]);
  }
}

// Gradients of box(a), box(b) and, through no box, of H, from that of the result.
inline void base_gradients(const double* image, const double* slope, const double* shift, int64_t count,
                           double* grad_then_direct, double* grad_slope, double* grad_shift) {
  for (int64_t i = 0; i < count; ++i) {
    LimitGradient<double> grad = limit_gradient(grad_then_direct[i], image[i], slope[i] * image[i] + shift[i]);
    grad_slope[i] = grad.base * image[i];
    grad_shift[i] = grad.base;
    grad_then_direct[i] = grad.image + grad.base * slope[i];
  }
}

template <class T>
void need_base_gradients(TruncateStream<T>& s, int64_t last) {
  const int64_t row = s.p.row();
  for (int64_t& y = s.ws.direct.next; y <= last && y < s.p.height; ++y) {
    filter_row(s, y);
    double* direct = s.ws.direct.row(y);
    read_row(s.grad_output + y * row, direct, row);
    base_gradients(s.ws.image.row(y), s.first_means, s.second_means, row, direct, s.ws.grad_slope.row(y),
                   s.ws.grad_shift.row(y));
  }
}

// The transposed box of two images at row y, in first_means and second_means.
template <class T>
void transposed_row(TruncateStream<T>& s, const RowRing& first, const RowRing& second, int64_t y) {
  int64_t count = transposed_box_rows(first, y, s.p, s.ws.rows);
  column_sums(s.ws.rows, count, s.p.row(), s.first_columns);
  transposed_box_means(s.first_columns, s.p, s.first_means);
  count = transposed_box_rows(second, y, s.p, s.ws.rows);
  column_sums(s.ws.rows, count, s.p.row(), s.second_columns);
  transposed_box_means(s.second_columns, s.p, s.second_means);
}

// Gradients of m and of box(H^2) from those of a and b.
inline void moment_gradients(const double* grad_slope, const double* grad_shift, const double* slope,
                             const double* mean, const double* inverse, double eps, int64_t count, double* grad_mean,
                             double* grad_square) {
  for (int64_t i = 0; i < count; ++i) {
    double grad_variance = (grad_slope[i] - mean[i] * grad_shift[i]) * eps * inverse[i] * inverse[i];
    grad_mean[i] = grad_shift[i] * (1 - slope[i]) - 2 * mean[i] * grad_variance;
    grad_square[i] = grad_variance;
  }
}

template <class T>
void need_moment_gradients(TruncateStream<T>& s, int64_t last) {
  for (int64_t& y = s.ws.grad_mean.next; y <= last && y < s.p.height; ++y) {
    need_base_gradients(s, y + s.p.radius);
    transposed_row(s, s.ws.grad_slope, s.ws.grad_shift, y);
    moment_gradients(s.first_means, s.second_means, s.ws.slope.row(y), s.ws.mean.row(y), s.ws.inverse.row(y), s.p.eps,
                     s.p.row(), s.ws.grad_mean.row(y), s.ws.grad_square.row(y));
  }
}

inline void image_gradient(double* mean_then_result, const double* square, const double* direct, const double* image,
                           int64_t count) {
  for (int64_t i = 0; i < count; ++i) mean_then_result[i] += direct[i] + 2 * image[i] * square[i];
}

// Rows [begin, end) of one plane, of the result or (with grad_output) of the input's gradient.
template <class T>
void truncate_rows(const TruncateParams& p, int64_t begin, int64_t end, const T* input, const T* grad_output, T* output,
                   TruncateWorkspace& ws) {
  const int64_t margin = p.radius * p.step;
  TruncateStream<T> s{p,
                      ws,
                      input,
                      grad_output,
                      ws.first_columns + 2 * margin,
                      ws.second_columns + 2 * margin,
                      ws.first_sums + margin,
                      ws.second_sums + margin};
  RowRing* stages[] = {&ws.grad_mean, &ws.direct, &ws.slope, &ws.image};
  for (int k = 0; k < 4; ++k) {
    const int64_t reach = (grad_output != nullptr ? k + 1 : k - 1) * p.radius;
    stages[k]->next = begin > reach ? begin - reach : 0;
  }
  for (int64_t y = begin; y < end; ++y) {
    if (grad_output == nullptr) {
      filter_row(s, y);
      limit_bases(ws.image.row(y), s.first_means, s.second_means, p.row());
    } else {
      need_moment_gradients(s, y + p.radius);
      transposed_row(s, ws.grad_mean, ws.grad_square, y);
      image_gradient(s.first_means, s.second_means, ws.direct.row(y), ws.image.row(y), p.row());
    }
    write_row(s.first_means, output + y * p.row(), p.row());
  }
}

template <class T>
void truncate_tasks(const TruncateParams& p, int64_t first_task, int64_t task_step, const T* input,
                    const T* grad_output, T* output, TruncateWorkspace& ws) {
  for (int64_t task = first_task; task < p.tasks(); task += task_step) {
    const int64_t plane = task / p.tasks_per_plane() * p.height * p.row();
    const int64_t begin = task % p.tasks_per_plane() * p.rows_per_task;
    const int64_t end = begin + p.rows_per_task < p.height ? begin + p.rows_per_task : p.height;
    truncate_rows<T>(p, begin, end, input + plane, grad_output == nullptr ? nullptr : grad_output + plane,
                     output + plane, ws);
  }
}

}  // namespace HDROPS_ISA
}  // namespace hdrops
