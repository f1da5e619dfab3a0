//! The eigenvalues of a symmetric matrix, in double precision.

/// The eigenvalues of a symmetric matrix `[size, size]`, in descending order; exact to some units in the last place of the
/// largest.
///
/// Householder reflections make the matrix tridiagonal (Golub and Van Loan, section 8.3.1). Of that, Sturm sequences tell how
/// many eigenvalues are below a number (section 8.4.1), which bisection uses. No vectors are computed, and the work is the
/// same for any number of threads.
pub(super) fn eigenvalues(matrix: Vec<f64>, size: usize) -> Vec<f64> {
    let (diagonal, beside) = tridiagonal(matrix, size);
    let radius =
        |i: usize| beside.get(i).map_or(0.0, |b: &f64| b.abs()) + if i > 0 { beside[i - 1].abs() } else { 0.0 };
    let bound = (0..size).map(|i| diagonal[i].abs() + radius(i)).fold(0.0, f64::max);
    // A pivot of zero would say nothing of those behind it.
    let smallest = (bound * f64::EPSILON).max(f64::MIN_POSITIVE);
    let below = |at: f64| {
        let (mut count, mut pivot) = (0, 1.0);
        for (i, diagonal) in diagonal.iter().enumerate() {
            let coupling = if i > 0 { beside[i - 1].powi(2) } else { 0.0 };
            pivot = diagonal - at - coupling / pivot;
            if pivot.abs() < smallest {
                pivot = -smallest;
            }
            count += usize::from(pivot < 0.0);
        }
        count
    };
    let find = |index: usize| {
        let (mut low, mut high) = (-bound, bound);
        loop {
            let middle = 0.5 * (low + high);
            if middle <= low || middle >= high || high - low <= smallest {
                return middle;
            }
            match below(middle) > index {
                true => high = middle,
                false => low = middle,
            }
        }
    };
    (0..size).rev().map(find).collect()
}

/// The diagonal and what is beside it, of a tridiagonal matrix with the same eigenvalues.
fn tridiagonal(mut matrix: Vec<f64>, size: usize) -> (Vec<f64>, Vec<f64>) {
    let mut beside = vec![0.0; size.saturating_sub(1)];
    for step in 0..size.saturating_sub(1) {
        let below = step + 1..size;
        let mut mirror: Vec<f64> = below.clone().map(|row| matrix[row * size + step]).collect();
        let length = mirror.iter().map(|v| v * v).sum::<f64>().sqrt();
        let onto = if mirror[0] > 0.0 { -length } else { length };
        beside[step] = onto;
        mirror[0] -= onto;
        let square = mirror.iter().map(|v| v * v).sum::<f64>();
        if square == 0.0 {
            continue;
        }
        // A - v w' - w v', where v is the mirror and w = p - (p'v / v'v) v of p = 2 A v / v'v.
        let row = |at: usize| at * size + step + 1..(at + 1) * size;
        let product = |at: usize| 2.0 / square * matrix[row(at)].iter().zip(&mirror).map(|(a, v)| a * v).sum::<f64>();
        let mut update: Vec<f64> = below.clone().map(product).collect();
        let along = update.iter().zip(&mirror).map(|(p, v)| p * v).sum::<f64>() / square;
        update.iter_mut().zip(&mirror).for_each(|(p, v)| *p -= along * v);
        for (at, (v, w)) in below.zip(mirror.iter().zip(&update)) {
            let others = mirror.iter().zip(&update);
            matrix[row(at)].iter_mut().zip(others).for_each(|(a, (other_v, other_w))| *a -= v * other_w + w * other_v);
        }
    }
    ((0..size).map(|i| matrix[i * size + i]).collect(), beside)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The second differences of a string with fixed ends: its eigenvalues are known, and here it is turned about a plane.
    #[test]
    fn a_strings_frequencies() {
        let size = 40;
        let mut matrix = vec![0.0; size * size];
        for i in 0..size {
            matrix[i * size + i] = 2.0;
            if i > 0 {
                (matrix[i * size + i - 1], matrix[(i - 1) * size + i]) = (-1.0, -1.0);
            }
        }
        // I - 2 v v' on both sides.
        let v: Vec<f64> = (0..size).map(|i| (1.0 + i as f64).sin()).collect();
        let square: f64 = v.iter().map(|v| v * v).sum();
        for _ in 0..2 {
            let rows: Vec<f64> =
                matrix.chunks_exact(size).map(|row| row.iter().zip(&v).map(|(a, v)| a * v).sum()).collect();
            let mut turned = vec![0.0; size * size];
            for i in 0..size {
                for j in 0..size {
                    turned[j * size + i] = matrix[i * size + j] - 2.0 * rows[i] * v[j] / square;
                }
            }
            matrix = turned;
        }
        let ours = eigenvalues(matrix, size);
        for (k, ours) in (1..=size).rev().zip(ours) {
            let angle = std::f64::consts::PI * k as f64 / (2.0 * (size + 1) as f64);
            assert!((ours - 4.0 * angle.sin().powi(2)).abs() < 1e-13, "{k}: {ours}");
        }
        assert!((eigenvalues(vec![3.0], 1)[0] - 3.0).abs() < 1e-14);
        assert!(eigenvalues(vec![0.0; 4], 2).iter().all(|zero| zero.abs() < 1e-300));
    }
}
