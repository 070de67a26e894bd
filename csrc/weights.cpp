// Solves the small regularised systems of Anderson's method, one per sample, in float64.
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

}  // namespace

void anderson_weights(const double* gram, const bool* valid, double regularization, double* alpha, std::int64_t samples,
                      int m) {
    for (; samples > 0; --samples, gram += m * m, valid += m, alpha += m) {
        double system[kMaxMemory][kMaxMemory], inverse[kMaxMemory];
        for (int i = 0; i < m; ++i) {
            const double norm = std::sqrt(gram[i * m + i]);
            alpha[i] = inverse[i] = valid[i] && norm > 0 ? 1 / norm : 0;
        }
        for (int i = 0; i < m; ++i) {
            for (int j = 0; j < m; ++j)
                system[i][j] = valid[i] && valid[j] ? gram[i * m + j] * inverse[i] * inverse[j] : 0;
            system[i][i] += inverse[i] > 0 ? regularization : 1;
        }
        solve(system, alpha, m);
        double sum = 0;
        for (int i = 0; i < m; ++i) sum += alpha[i] *= inverse[i];
        for (int i = 0; i < m; ++i) alpha[i] /= sum;
    }
}

}  // namespace jfbfast
