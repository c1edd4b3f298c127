// One system of few samples on one instruction set. The codes are eliminated first, T = L D L^T costing little with
// its two bands; what remains couples the samples only (Woodbury's identity):
//
//     g = T^-1 right + T^-1 M e,      (D - M^T T^-1 M) e = M^T T^-1 right,      M = [m_1 .. m_S], D = diag(d_i).
namespace hdrops {
namespace HDROPS_ISA {

// target[begin, end) -= factor * source[begin, end), rounded out to whole vectors of the padded rows.
HDROPS_HD void subtract_row(double* target, const double* source, double factor, int64_t begin, int64_t end) {
  constexpr int N = kLanes<double>;
  for (int64_t i = begin / N * N; i < end; i += N) {
    store<N>(target + i, load<N>(target + i) - factor * load<N>(source + i));
  }
}

HDROPS_HD void scale_row(double* row, double factor, int64_t begin, int64_t end) {
  constexpr int N = kLanes<double>;
  for (int64_t i = begin / N * N; i < end; i += N) store<N>(row + i, factor * load<N>(row + i));
}

// How many codes an observation reads, from `lower` on, and the share of each.
HDROPS_HD int64_t codes_read(const DebevecParams& p) { return p.fraction == nullptr ? 1 : 2; }

HDROPS_HD double share(const DebevecParams& p, int64_t observation, int64_t code) {
  double above = p.fraction == nullptr ? 0 : p.fraction[observation];
  return code == 0 ? 1 - above : above;
}

// The bands of T, anchored: any stiffness at the middle code gives the solution that is 0 there.
void gather_bands(const DebevecParams& p, int64_t system, DebevecWorkspace& ws) {
  for (int64_t z = 0; z < 3 * p.levels; ++z) ws.diagonal[z] = 0;
  int64_t first = system * p.samples * p.frames, last = first + p.samples * p.frames;
  double total = 0;
  for (int64_t o = first; o < last; ++o) {
    int64_t lower = p.lower[o];
    double weight = p.square[o], at = share(p, o, 0), above = share(p, o, 1);
    total += weight;
    ws.diagonal[lower] += weight * at * at;
    if (above == 0) continue;
    ws.diagonal[lower + 1] += weight * above * above;
    ws.beside[lower] += weight * above * at;
  }
  for (int64_t z = 1; z < p.levels - 1; ++z) {
    double s = p.strength[z];
    total += 6 * s;
    ws.diagonal[z - 1] += s, ws.diagonal[z] += 4 * s, ws.diagonal[z + 1] += s;
    ws.beside[z - 1] -= 2 * s, ws.beside[z] -= 2 * s;
    ws.beyond[z - 1] += s;
  }
  ws.diagonal[p.levels / 2] += total / double(p.levels);
}

// T = L D L^T: the diagonal becomes 1 / D, the other bands those of L. False unless T is positive definite.
bool factor_bands(int64_t levels, DebevecWorkspace& ws) {
  for (int64_t z = 0; z < levels; ++z) {
    double pivot = ws.diagonal[z];
    if (!(pivot > 0 && pivot < HUGE_VAL)) return false;
    double one = ws.beside[z] / pivot, two = ws.beyond[z] / pivot;
    if (z + 1 < levels) {
      ws.diagonal[z + 1] -= one * ws.beside[z];
      ws.beside[z + 1] -= one * ws.beyond[z];
    }
    if (z + 2 < levels) ws.diagonal[z + 2] -= two * ws.beyond[z];
    ws.diagonal[z] = 1 / pivot, ws.beside[z] = one, ws.beyond[z] = two;
  }
  return true;
}

// The columns m_1 .. m_S and, last, the right side.
void gather_columns(const DebevecParams& p, int64_t system, DebevecWorkspace& ws) {
  memset(ws.code_row(0), 0, size_t(p.levels * ws.pitch) * sizeof(double));
  int64_t o = system * p.samples * p.frames;
  for (int64_t i = 0; i < p.samples; ++i) {
    for (int64_t j = 0; j < p.frames; ++j, ++o) {
      for (int64_t k = 0; k < codes_read(p); ++k) ws.code_row(p.lower[o] + k)[i] += p.square[o] * share(p, o, k);
    }
  }
  for (int64_t z = 0; z < p.levels; ++z) ws.code_row(z)[p.samples] = p.right[system * p.levels + z];
}

// T^-1 times all columns.
void solve_bands(int64_t levels, int64_t columns, DebevecWorkspace& ws) {
  for (int64_t z = 1; z < levels; ++z) {
    subtract_row(ws.code_row(z), ws.code_row(z - 1), ws.beside[z - 1], 0, columns);
    if (z > 1) subtract_row(ws.code_row(z), ws.code_row(z - 2), ws.beyond[z - 2], 0, columns);
  }
  for (int64_t z = levels - 1; z >= 0; --z) {
    scale_row(ws.code_row(z), ws.diagonal[z], 0, columns);
    if (z + 1 < levels) subtract_row(ws.code_row(z), ws.code_row(z + 1), ws.beside[z], 0, columns);
    if (z + 2 < levels) subtract_row(ws.code_row(z), ws.code_row(z + 2), ws.beyond[z], 0, columns);
  }
}

// [D - M^T T^-1 M | -M^T T^-1 right], of which the factorisation reads what is right of the diagonal.
void gather_coupling(const DebevecParams& p, int64_t system, DebevecWorkspace& ws) {
  memset(ws.sample_row(0), 0, size_t(p.samples * ws.pitch) * sizeof(double));
  int64_t o = system * p.samples * p.frames;
  for (int64_t i = 0; i < p.samples; ++i) {
    double* row = ws.sample_row(i);
    double total = 0;
    for (int64_t j = 0; j < p.frames; ++j, ++o) {
      if (p.square[o] == 0) continue;
      total += p.square[o];
      for (int64_t k = 0; k < codes_read(p); ++k) {
        subtract_row(row, ws.code_row(p.lower[o] + k), p.square[o] * share(p, o, k), i, p.samples + 1);
      }
    }
    row[i] += total > 0 ? total : 1;  // a sample without weight couples to nothing
  }
}

// Cholesky by rows, right side included; the rows' last entries become -e. False unless positive definite.
bool solve_coupling(int64_t samples, DebevecWorkspace& ws) {
  for (int64_t k = 0; k < samples; ++k) {
    double* row = ws.sample_row(k);
    double pivot = row[k];
    if (!(pivot > 0 && pivot < HUGE_VAL)) return false;
    scale_row(row, 1 / sqrt(pivot), k, samples + 1);
    for (int64_t i = k + 1; i < samples; ++i) subtract_row(ws.sample_row(i), row, row[i], i, samples + 1);
  }
  for (int64_t k = samples - 1; k >= 0; --k) {
    double* row = ws.sample_row(k);
    double value = row[samples];
    for (int64_t i = k + 1; i < samples; ++i) value -= row[i] * ws.sample_row(i)[samples];
    row[samples] = value / row[k];
  }
  return true;
}

bool solve_few_samples(const DebevecParams& p, int64_t system, DebevecWorkspace& ws) {
  gather_bands(p, system, ws);
  if (!factor_bands(p.levels, ws)) return false;
  gather_columns(p, system, ws);
  solve_bands(p.levels, p.samples + 1, ws);
  gather_coupling(p, system, ws);
  if (!solve_coupling(p.samples, ws)) return false;
  double* curve = p.curve + system * p.levels;
  for (int64_t z = 0; z < p.levels; ++z) {
    const double* row = ws.code_row(z);
    double value = row[p.samples];
    for (int64_t i = 0; i < p.samples; ++i) value -= row[i] * ws.sample_row(i)[p.samples];
    curve[z] = value;
  }
  double anchor = curve[p.levels / 2];
  for (int64_t z = 0; z < p.levels; ++z) curve[z] -= anchor;
  return true;
}

}  // namespace HDROPS_ISA
}  // namespace hdrops
