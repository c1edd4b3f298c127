// Forward pass of exposure merging: per block, ln E, then exp straight into the output.
namespace hdrops {
namespace HDROPS_ISA {

// float16 alone has a range that vexp's results exceed.
template <class Out>
constexpr bool kNarrowRange = false;
template <>
constexpr bool kNarrowRange<float16> = true;

// exp(ln E), held to what Out can store: positive and finite.
template <int N, class A, class Out>
HDROPS_HD void store_radiance(Out* target, vec<A, N> log_radiance) {
  vec<A, N> radiance = vexp<N>(log_radiance);
  if constexpr (kNarrowRange<Out>) {
    vec<A, N> least = splat<N>(A(0x1p-24)), most = splat<N>(A(65504));
    radiance = radiance < least ? least : radiance;
    radiance = radiance > most ? most : radiance;
  }
  store_narrow<N>(target, radiance);
}

template <class T, class Out, class A>
void merge_forward_tasks(const MergeParams<A>& p, const MergeTasks& tasks, int64_t block, int64_t first_task,
                         int64_t task_step, Out* output, MergeWorkspace<T, A>& ws) {
  constexpr int N = kLanes<A>;
  if (p.interleaved) prepare_offsets(p, block, ws);
  for (int64_t task = first_task; task < tasks.count(); task += task_step) {
    const int64_t stream = task / tasks.tasks_per_stream;
    const MergeStream<T, A> s = merge_stream<T>(p, stream);
    prepare_ends(p, s, block, ws);
    int64_t begin = task % tasks.tasks_per_stream * tasks.task_length;
    const int64_t end =
        begin + tasks.task_length < tasks.stream_length ? begin + tasks.task_length : tasks.stream_length;
    for (; begin < end; begin += block) {
      const int64_t count = end - begin < block ? end - begin : block;
      prepare(p, s, begin, block, count, ws);
      merge_block(p, s, ws, count);
      Out* target = output + stream * tasks.stream_length + begin;
      int64_t i = 0;
      for (; i + N <= count; i += N) store_radiance<N, A>(target + i, load<N>(ws.log_radiance + i));
      for (; i < count; ++i) store_radiance<1, A>(target + i, load<1>(ws.log_radiance + i));
    }
  }
}

}  // namespace HDROPS_ISA
}  // namespace hdrops
