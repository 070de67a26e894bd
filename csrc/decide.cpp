// What Anderson's method decides about one sample after an evaluation, and the weights of its next iterate. All of it
// is in float64, and the same as in jfbfast/solvers/loop.py and anderson.py.
#include <cfloat>
#include <cmath>
#include <utility>

#include "kernels.h"

namespace jfbfast {
namespace {

// Solves the m x m system in place by elimination with partial pivoting.
void solve(double (*system)[kMaxMemory], double* b, int m) {
    for (int k = 0; k < m; ++k) {
        int pivot = k;
        for (int i = k + 1; i < m; ++i)
            if (std::fabs(system[i][k]) > std::fabs(system[pivot][k])) pivot = i;
        for (int j = k; j < m; ++j) std::swap(system[k][j], system[pivot][j]);
        std::swap(b[k], b[pivot]);
        for (int i = k + 1; i < m; ++i) {
            const double factor = system[i][k] / system[k][k];
            for (int j = k + 1; j < m; ++j) system[i][j] -= factor * system[k][j];
            b[i] -= factor * b[k];
        }
    }
    for (int k = m; k-- > 0;) {
        for (int j = k + 1; j < m; ++j) b[k] -= system[k][j] * b[j];
        b[k] /= system[k][k];
    }
}

// Computes the weights of these slots, in their order, as reference.anderson_weights does.
void weights_of(const double* gram, int memory, const int* slots, int count, double regularization, double* alpha) {
    double system[kMaxMemory][kMaxMemory], inverse[kMaxMemory];
    for (int i = 0; i < count; ++i) {
        const double norm = std::sqrt(gram[slots[i] * memory + slots[i]]);
        alpha[i] = inverse[i] = norm > 0 ? 1 / norm : 0;
    }
    for (int i = 0; i < count; ++i) {
        for (int j = 0; j < count; ++j) system[i][j] = gram[slots[i] * memory + slots[j]] * inverse[i] * inverse[j];
        system[i][i] += inverse[i] > 0 ? regularization : 1;
    }
    solve(system, alpha, count);
    double sum = 0;
    for (int i = 0; i < count; ++i) sum += alpha[i] *= inverse[i];
    for (int i = 0; i < count; ++i) alpha[i] /= sum;
}

}  // namespace

void anderson_weights(const double* gram, const bool* valid, double regularization, double* alpha, std::int64_t samples,
                      int m) {
    for (; samples > 0; --samples, gram += m * m, valid += m, alpha += m) {
        int slots[kMaxMemory], count = 0;
        for (int slot = 0; slot < m; ++slot)
            if (valid[slot]) slots[count++] = slot;
        double weights[kMaxMemory];
        weights_of(gram, m, slots, count, regularization, weights);
        for (int slot = 0; slot < m; ++slot) alpha[slot] = 0;
        for (int i = 0; i < count; ++i) alpha[slots[i]] = weights[i];
    }
}

Decision decide(const Anderson& a, std::int64_t sample, const double* products, int* slots, double* alpha) {
    AndersonSample& s = a.states[sample];
    const int known = a.known(s);
    const double residual = std::sqrt(products[known]), image = std::sqrt(products[known + 1]);
    const std::int64_t evaluations = ++a.iterations[sample];
    if (evaluations == 1) s.bound = kDivergedGrowth * (residual + image);

    const bool finite = std::isfinite(residual) && std::isfinite(image);
    const bool converged = finite && residual <= a.tol * image + a.atol;
    const bool diverged = !converged && (!finite || residual > s.bound || image > s.bound);
    const bool improved = converged || (!diverged && residual < s.lowest);
    if (improved) {
        s.lowest = residual;
        a.residual[sample] = residual / (image > DBL_MIN ? image : DBL_MIN);
    }
    if (converged) a.status[sample] = kConverged;
    if (diverged) a.status[sample] = kDiverged;

    const bool fell = s.lowest <= kStallFall * s.mark;
    if (fell) s.mark = s.lowest;
    s.since = fell ? 0 : s.since + 1;
    const bool stalled = s.since >= kStallWindow && a.residual[sample] <= a.stall_floor;

    const bool ended = converged || diverged || stalled || evaluations >= a.budget[sample];
    a.running[sample] = !ended;

    const bool grown = residual > kSafeguardGrowth * s.guarded;
    if (grown || residual < s.guarded) s.guarded = residual;
    double* const gram = a.gram + sample * a.memory * a.memory;
    const int newest = a.slot(0);
    for (int age = 0; age < known; ++age)
        gram[newest * a.memory + a.slot(age)] = gram[a.slot(age) * a.memory + newest] = products[age];
    s.pairs = grown ? 1 : known;
    int count = 0;
    for (int slot = 0; slot < a.memory; ++slot)
        if (a.age(slot) < s.pairs) slots[count++] = slot;
    if (!grown && (!ended || improved)) weights_of(gram, a.memory, slots, count, a.regularization, alpha);
    return {ended, improved, grown};
}

}  // namespace jfbfast
