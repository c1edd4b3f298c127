// Backward pass of exposure merging. With d ln E / d v_j = m_j w_j / sum, v_j = ln g_j - ln t_j, and weights constant,
// every frame of an element gets q_j = grad E m_j w_j / sum: the exposure loses q_j, the curve gains q_j / g_j where
// the reading lies in it, the reading gains q_j g'_j / g_j. What an element needs resolve() for, it gets there too.
//
// 8-bit codes need no more per frame and element than one sum: a histogram over the codes of what comes before w, from
// which both gradients follow at a task's end.
namespace hdrops {
namespace HDROPS_ISA {

template <class T, class Out, class A>
struct MergeBackward {
  const MergeParams<A>& p;
  const MergeGradients& gradients;
  MergeWorkspace<T, A>& ws;
  MergeStream<T, A> s;
  int64_t begin;          // of the block, in the stream
  const Out* grad;        // of the block
  double* log_exposures;  // [P], of the task; never null
  double* curve;          // [channels of the stream, L], of the task; null where not wanted

  T* grad_row(int64_t j) const {
    if (gradients.stack == nullptr) return nullptr;
    const int64_t frame = (s.image * p.frames + s.order[j]) * p.channels + s.plane;
    return static_cast<T*>(gradients.stack) + frame * p.pixels + begin;
  }
};

// Codes' histograms of a task: one per frame of q / w, and one of what resolve() gave, [channels of the stream, 256].
template <class A>
HDROPS_HD int64_t code_bins(const MergeParams<A>& p) {
  return (p.interleaved && p.table_stride_c != 0 ? p.channels : 1) * kCodes8;
}

template <class Out, class A>
void gather_codes(MergeBackward<uint8_t, Out, A>& b, int64_t count) {
  const bool offsets = b.p.interleaved && b.p.table_stride_c != 0;
  for (int64_t j = 0; j < b.p.frames; ++j) {
    double* bin = b.ws.bin + j * code_bins(b.p);
    const uint8_t* row = b.ws.row[j];
    const A* share = b.ws.share[j];
    for (int64_t i = 0; i < count; ++i) {
      A q = b.ws.gain[i];
      if (share != nullptr) q *= share[i];
      bin[row[i] + (offsets ? b.ws.code_offset[i] : 0)] += q;
    }
  }
}

// What the histograms of a task say about the curve and the exposures.
template <class Out, class A>
void finish_codes(MergeBackward<uint8_t, Out, A>& b) {
  const MergeParams<A>& p = b.p;
  const int64_t bins = code_bins(p), length = p.curve_length;
  const double* resolved = b.ws.bin + p.frames * bins;
  for (int64_t at = 0; at < bins; ++at) {
    const int64_t z = at % kCodes8, channel = at / kCodes8;
    double sum = resolved[at];
    for (int64_t j = 0; j < p.frames; ++j) {
      const double q = double(p.code_weight[z]) * b.ws.bin[j * bins + at];
      b.log_exposures[b.s.order[j]] -= q;
      sum += q;
    }
    if (b.curve == nullptr) continue;
    const A* curve = b.s.curve + channel * p.curve_stride_c;
    double* into = b.curve + channel * length;
    const CodePlace place = place_of_code(int(z), length);
    const double q = sum / between(curve[place.lower], curve[place.upper], place.fraction);
    into[place.lower] += (1 - place.fraction) * q;
    into[place.upper] += place.fraction * q;
  }
}

// Frame j's gradients of N elements from i, given q of each.
template <int N, class T, class Out, class A>
HDROPS_HD vec<A, N> reading_gradients(MergeBackward<T, Out, A>& b, const FrameTerms<N, A>& terms, vec<A, N> q,
                                      T* target) {
  vec<A, N> relative = q / terms.response;
  if (b.curve != nullptr) {
    vec<A, N> upper = relative * terms.place.fraction, lower = relative - upper;
    for (int lane = 0; lane < N; ++lane) {
      b.curve[terms.place.lower[lane]] += lower[lane];
      b.curve[terms.place.upper[lane]] += upper[lane];
    }
  }
  if constexpr (kMergeMax<T> == 1) {
    if (target != nullptr) store_narrow<N>(target, relative * terms.slope);
  }
  return q;
}

template <int N, class T, class Out, class A>
HDROPS_HD vec<A, N> frame_gradients(MergeBackward<T, Out, A>& b, int64_t j, int64_t i, T* row_gradient) {
  const int32_t* offset = b.p.interleaved && b.p.curve_stride_c != 0 ? b.ws.curve_offset + i : nullptr;
  auto terms = frame_terms<T, N>(b.p, b.s.curve, offset, load_reading<N, A>(b.ws.row[j] + i));
  vec<A, N> q = load<N>(b.ws.gain + i) * terms.weight;
  if (b.ws.share[j] != nullptr) q *= load<N>(b.ws.share[j] + i);
  return reading_gradients<N>(b, terms, q, row_gradient == nullptr ? nullptr : row_gradient + i);
}

template <class T, class Out, class A>
void gather_readings(MergeBackward<T, Out, A>& b, int64_t count) {
  constexpr int N = kLanes<A>;
  for (int64_t j = 0; j < b.p.frames; ++j) {
    T* target = b.grad_row(j);
    vec<A, N> sum = splat<N>(A(0));
    int64_t i = 0;
    for (; i + N <= count; i += N) sum += frame_gradients<N>(b, j, i, target);
    double rest = reduce_add<A, N>(sum);
    for (; i < count; ++i) rest += frame_gradients<1>(b, j, i, target)[0];
    b.log_exposures[b.s.order[j]] -= rest;
  }
}

// The gradients of one element that resolve() merged; `scale` is grad E.
template <class T, class Out, class A>
void gather_resolved(MergeBackward<T, Out, A>& b, int64_t i, A scale) {
  const MergeParams<A>& p = b.p;
  for (int64_t j = 0; j < p.frames; ++j) {
    const A q = scale * b.ws.fraction[j];
    if (b.ws.fraction[j] == 0) continue;
    if constexpr (sizeof(T) == 1) {
      const bool offsets = p.interleaved && p.table_stride_c != 0;
      b.ws.bin[p.frames * code_bins(p) + b.ws.row[j][i] + (offsets ? b.ws.code_offset[i] : 0)] += q;
    } else {
      const int32_t* offset = p.interleaved && p.curve_stride_c != 0 ? b.ws.curve_offset + i : nullptr;
      auto terms = frame_terms<T, 1>(p, b.s.curve, offset, load_reading<1, A>(b.ws.row[j] + i));
      T* target = b.grad_row(j);
      reading_gradients<1>(b, terms, splat<1>(q), target == nullptr ? nullptr : target + i);
    }
    b.log_exposures[b.s.order[j]] -= q;
  }
}

template <class T, class Out, class A>
void merge_backward_block(MergeBackward<T, Out, A>& b, int64_t block, int64_t count) {
  const MergeParams<A>& p = b.p;
  MergeWorkspace<T, A>& ws = b.ws;
  prepare(p, b.s, b.begin, block, count, ws);
  accumulate(p, b.s, ws, count);
  const bool unresolved = log_radiance_of_sums(ws.weight_sum, ws.value_sum, ws.log_radiance, count);
  constexpr int N = kLanes<A>;
  int64_t i = 0;
  for (; i + N <= count; i += N) {
    vec<A, N> scale = load_wide<N>(b.grad + i) * vexp<N>(load<N>(ws.log_radiance + i));
    store<N>(ws.gain + i, scale / (load<N>(ws.weight_sum + i) + A(kMergeEpsilon)));
  }
  for (; i < count; ++i) {
    A radiance = vexp<1>(load<1>(ws.log_radiance + i))[0];
    ws.gain[i] = A(widen(b.grad[i])) * radiance / (ws.weight_sum[i] + A(kMergeEpsilon));
  }
  if (unresolved) {
    for (i = 0; i < count; ++i) ws.gain[i] = ws.weight_sum[i] <= A(kNoWeight) ? A(0) : ws.gain[i];
  }
  if constexpr (sizeof(T) == 1) {
    gather_codes(b, count);
  } else {
    gather_readings(b, count);
  }
  if (!unresolved) return;
  for (i = 0; i < count; ++i) {
    if (ws.weight_sum[i] > A(kNoWeight)) continue;
    vec<A, 1> log_radiance = splat<1>(resolve(p, b.s, ws, i));
    gather_resolved(b, i, A(widen(b.grad[i])) * vexp<1>(log_radiance)[0]);
  }
}

template <class T, class Out, class A>
void merge_backward_tasks(const MergeParams<A>& p, const MergeTasks& tasks, int64_t block, int64_t first_task,
                          int64_t task_step, const Out* grad_output, const MergeGradients& gradients,
                          MergeWorkspace<T, A>& ws) {
  if (p.interleaved) prepare_offsets(p, block, ws);
  const int64_t curve_size = p.interleaved && p.curve_stride_c != 0 ? p.channels * p.curve_length : p.curve_length;
  for (int64_t task = first_task; task < tasks.count(); task += task_step) {
    const int64_t stream = task / tasks.tasks_per_stream;
    int64_t begin = task % tasks.tasks_per_stream * tasks.task_length;
    const int64_t end =
        begin + tasks.task_length < tasks.stream_length ? begin + tasks.task_length : tasks.stream_length;
    MergeBackward<T, Out, A> b{p,
                               gradients,
                               ws,
                               merge_stream<T>(p, stream),
                               begin,
                               nullptr,
                               gradients.log_exposures + task * p.frames,
                               gradients.curve == nullptr ? nullptr : gradients.curve + task * curve_size};
    __builtin_memset(b.log_exposures, 0, size_t(p.frames) * sizeof(double));
    if (b.curve != nullptr) __builtin_memset(b.curve, 0, size_t(curve_size) * sizeof(double));
    if constexpr (sizeof(T) == 1) {
      __builtin_memset(ws.bin, 0, size_t((p.frames + 1) * code_bins(p)) * sizeof(double));
    }
    for (; b.begin < end; b.begin += block) {
      b.grad = grad_output + stream * tasks.stream_length + b.begin;
      merge_backward_block(b, block, end - b.begin < block ? end - b.begin : block);
    }
    if constexpr (sizeof(T) == 1) finish_codes(b);
  }
}

}  // namespace HDROPS_ISA
}  // namespace hdrops
