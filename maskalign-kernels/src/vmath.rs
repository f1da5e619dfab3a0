//! Elementary functions that the compiler vectorises, and the macro that dispatches a loop.
//!
//! Every function is `#[inline(always)]`, free of branches and generic over `FMA`: called in a loop
//! inside a function compiled for AVX2, AVX-512 or NEON it becomes vector code. `FMA` says whether
//! the surrounding code has fused multiply-add; without it `f32::mul_add` would be a library call.
//!
//! The polynomial and rational coefficients are minimax fits (iteratively reweighted least squares
//! in double precision) against the error function and the exponential of the C library.

/// `a * b + c`, fused where `FMA`.
#[inline(always)]
pub fn fma<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FMA { a.mul_add(b, c) } else { a * b + c }
}

/// `e^x` to about 1.5 units in the last place; below -86.9 it is 0, above 88.7 infinity.
#[inline(always)]
pub fn exp<const FMA: bool>(x: f32) -> f32 {
    // Added and taken away, it rounds to the nearest integer, which then sits in the low bits.
    const ROUND: f32 = 12_582_912.0;
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let shifted = fma::<FMA>(x, std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = fma::<FMA>(n, -LN2_HIGH, x);
    let r = fma::<FMA>(n, -LN2_LOW, r);
    let mut p = 1.381_314_5e-3;
    p = fma::<FMA>(p, r, 8.369_419e-3);
    p = fma::<FMA>(p, r, 4.166_845_7e-2);
    p = fma::<FMA>(p, r, 1.666_651_5e-1);
    p = fma::<FMA>(p, r, 4.999_999_3e-1);
    p = fma::<FMA>(p, r * r, r) + 1.0;
    // 2^(n-1), so that n = 128 stays finite until the final doubling.
    let scale = f32::from_bits(shifted.to_bits().wrapping_add(126) << 23);
    let y = p * scale * 2.0;
    let y = if x < -86.9 { 0.0 } else { y };
    if x > 88.722_83 { f32::INFINITY } else { y }
}

/// Where the normal distribution function rounds to 0 and 1.
const NORMAL_LIMIT: f32 = 5.6;

/// `(Phi(x) - 1/2) / x` on `|x| <= NORMAL_LIMIT`, `Phi` the normal distribution function.
#[inline(always)]
fn normal_ratio<const FMA: bool>(x: f32) -> f32 {
    let s = x * x;
    let mut p = 2.214_518_3e-8;
    p = fma::<FMA>(p, s, 6.356_497_6e-6);
    p = fma::<FMA>(p, s, 1.738_499_8e-4);
    p = fma::<FMA>(p, s, 4.707_255e-3);
    p = fma::<FMA>(p, s, 3.437_606_5e-2);
    p = fma::<FMA>(p, s, 3.989_422_2e-1);
    let mut q = 1.180_205_5e-6;
    q = fma::<FMA>(q, s, 7.510_152e-5);
    q = fma::<FMA>(q, s, 1.912_974_4e-3);
    q = fma::<FMA>(q, s, 2.894_006e-2);
    q = fma::<FMA>(q, s, 2.528_337_3e-1);
    q = fma::<FMA>(q, s, 1.0);
    p / q
}

/// The distribution function of the standard normal distribution, to 1.7e-7.
#[inline(always)]
pub fn normal_cdf<const FMA: bool>(x: f32) -> f32 {
    let y = fma::<FMA>(x, normal_ratio::<FMA>(x), 0.5);
    let y = if x < -NORMAL_LIMIT { 0.0 } else { y };
    if x > NORMAL_LIMIT { 1.0 } else { y }
}

/// `2^x` to a relative 1.5e-7, saturated outside `-125..126`: cheaper than [`exp`] where the
/// extremes do not matter.
#[inline(always)]
fn exp2_saturated<const FMA: bool>(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0;
    let x = if x < -125.0 { -125.0 } else { x };
    let x = if x > 126.0 { 126.0 } else { x };
    let shifted = x + ROUND;
    let f = x - (shifted - ROUND);
    let mut p = 1.326_335_8e-3;
    p = fma::<FMA>(p, f, 9.672_581e-3);
    p = fma::<FMA>(p, f, 5.550_747e-2);
    p = fma::<FMA>(p, f, 2.402_222_5e-1);
    p = fma::<FMA>(p, f, 6.931_469_6e-1);
    p = fma::<FMA>(p, f, 1.0);
    // The integer that `shifted` holds in its low bits is added to the exponent.
    f32::from_bits(p.to_bits().wrapping_add(shifted.to_bits() << 23))
}

/// `1 / (1 + e^-x)`, to an absolute 1.5e-7.
#[inline(always)]
pub fn sigmoid<const FMA: bool>(x: f32) -> f32 {
    1.0 / (1.0 + exp2_saturated::<FMA>(-std::f32::consts::LOG2_E * x))
}

/// The exact (erf) GELU, `x Phi(x)`, to 2e-7 times `max(1, |x|)`.
#[inline(always)]
pub fn gelu<const FMA: bool>(x: f32) -> f32 {
    x * normal_cdf::<FMA>(x)
}

/// The derivative of [`gelu`]: `Phi(x) + x phi(x)`.
#[inline(always)]
pub fn gelu_grad<const FMA: bool>(x: f32) -> f32 {
    const INV_SQRT_2PI: f32 = 0.398_942_3;
    let density = INV_SQRT_2PI * exp::<FMA>(-0.5 * (x * x));
    fma::<FMA>(x, density, normal_cdf::<FMA>(x))
}

/// The slope inside the sigmoid of [`quick_gelu`].
const QUICK: f32 = 1.702;

/// CLIP's approximation of GELU, `x sigmoid(1.702 x)`.
#[inline(always)]
pub fn quick_gelu<const FMA: bool>(x: f32) -> f32 {
    x / (1.0 + exp2_saturated::<FMA>((-QUICK * std::f32::consts::LOG2_E) * x))
}

/// The derivative of [`quick_gelu`].
#[inline(always)]
pub fn quick_gelu_grad<const FMA: bool>(x: f32) -> f32 {
    let s = sigmoid::<FMA>(QUICK * x);
    s * fma::<FMA>(QUICK * x, 1.0 - s, 1.0)
}

/// Declares functions that run one body compiled for each instruction set, chosen by
/// [`isa`](crate::arch::isa).
///
/// The body is a function with `#[inline(always)]` and a first generic parameter
/// `const FMA: bool`; what it calls per element must be `#[inline(always)]` too. Reductions are not
/// reordered by the compiler: write them over an array of lanes.
///
/// ```
/// use maskalign_kernels::{simd_fn, vmath};
///
/// simd_fn! {
///     /// `y[i] = e^x[i]`.
///     pub fn exp_all(x: &[f32], y: &mut [f32]) = exp_body;
/// }
///
/// #[inline(always)]
/// fn exp_body<const FMA: bool>(x: &[f32], y: &mut [f32]) {
///     for (y, &x) in y.iter_mut().zip(x) {
///         *y = vmath::exp::<FMA>(x);
///     }
/// }
///
/// let mut y = [0.0];
/// exp_all(&[0.0], &mut y);
/// assert_eq!(y, [1.0]);
/// ```
#[macro_export]
macro_rules! simd_fn {
    ($(
        $(#[$meta:meta])*
        $vis:vis fn $name:ident $(<$($life:lifetime),*>)? ($($arg:ident : $ty:ty),* $(,)?)
            $(-> $ret:ty)? = $body:ident;
    )*) => {$(
        $(#[$meta])*
        #[allow(clippy::too_many_arguments)]
        $vis fn $name $(<$($life),*>)? ($($arg: $ty),*) $(-> $ret)? {
            #[cfg(target_arch = "x86_64")]
            {
                // As many arguments as the function has that is dispatched.
                #[allow(clippy::too_many_arguments)]
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
                fn avx512 $(<$($life),*>)? ($($arg: $ty),*) $(-> $ret)? {
                    $body::<true>($($arg),*)
                }
                // As many arguments as the function has that is dispatched.
                #[allow(clippy::too_many_arguments)]
                #[target_feature(enable = "avx2,fma")]
                fn avx2 $(<$($life),*>)? ($($arg: $ty),*) $(-> $ret)? {
                    $body::<true>($($arg),*)
                }
                match $crate::arch::isa() {
                    // SAFETY: `isa` returns a set only where this machine has its features.
                    $crate::arch::Isa::Avx512 => return unsafe { avx512($($arg),*) },
                    // SAFETY: as above.
                    $crate::arch::Isa::Avx2 => return unsafe { avx2($($arg),*) },
                    $crate::arch::Isa::Neon | $crate::arch::Isa::Scalar => {}
                }
            }
            if cfg!(target_arch = "aarch64") {
                // Fused multiply-add belongs to the baseline of 64-bit Arm.
                $body::<true>($($arg),*)
            } else {
                $body::<false>($($arg),*)
            }
        }
    )*};
}

#[cfg(test)]
mod tests {
    use super::*;

    simd_fn! {
        fn exp_all(x: &[f32], y: &mut [f32]) = exp_body;
        fn gelu_all(x: &[f32], y: &mut [f32]) = gelu_body;
        fn gelu_grad_all(x: &[f32], y: &mut [f32]) = gelu_grad_body;
        fn quick_gelu_all(x: &[f32], y: &mut [f32]) = quick_gelu_body;
        fn quick_gelu_grad_all(x: &[f32], y: &mut [f32]) = quick_gelu_grad_body;
    }

    macro_rules! bodies {
        ($($body:ident = $f:ident),*) => {$(
            #[inline(always)]
            fn $body<const FMA: bool>(x: &[f32], y: &mut [f32]) {
                for (y, &x) in y.iter_mut().zip(x) {
                    *y = $f::<FMA>(x);
                }
            }
        )*};
    }
    bodies!(
        exp_body = exp,
        gelu_body = gelu,
        gelu_grad_body = gelu_grad,
        quick_gelu_body = quick_gelu,
        quick_gelu_grad_body = quick_gelu_grad
    );

    /// x, and PyTorch's float64 gelu(x), gelu'(x), x sigmoid(1.702 x) and its derivative (autograd).
    const ORACLE: &[[f64; 5]] = &include!("../tests/fixtures/activations.in");

    fn column(f: fn(&[f32], &mut [f32]), column: usize, tolerance: f64) {
        let x: Vec<f32> = ORACLE.iter().map(|row| row[0] as f32).collect();
        let mut y = vec![0.0; x.len()];
        f(&x, &mut y);
        for (row, &y) in ORACLE.iter().zip(&y) {
            let scale = row[0].abs().max(1.0);
            let error = (f64::from(y) - row[column]).abs() / scale;
            assert!(error <= tolerance, "f({}) = {y}, expected {}", row[0], row[column]);
        }
    }

    #[test]
    fn activations_agree_with_pytorch() {
        column(gelu_all, 1, 2.5e-7);
        column(gelu_grad_all, 2, 3e-7);
        column(quick_gelu_all, 3, 2.5e-7);
        column(quick_gelu_grad_all, 4, 3e-7);
    }

    #[test]
    fn exp_has_a_small_relative_error_over_its_whole_range() {
        let x: Vec<f32> = (0..200_000).map(|i| -86.9 + i as f32 * (175.6 / 200_000.0)).collect();
        let mut y = vec![0.0; x.len()];
        exp_all(&x, &mut y);
        for (&x, &y) in x.iter().zip(&y) {
            let want = f64::from(x).exp();
            assert!((f64::from(y) / want - 1.0).abs() < 2e-7, "exp({x}) = {y}, expected {want}");
        }
    }

    #[test]
    fn exp_and_gelu_handle_the_extremes() {
        let x = [f32::NEG_INFINITY, -1e30, -200.0, 0.0, 200.0, f32::INFINITY, f32::NAN];
        let mut y = [7.0; 7];
        exp_all(&x, &mut y);
        assert_eq!(y[..6], [0.0, 0.0, 0.0, 1.0, f32::INFINITY, f32::INFINITY]);
        assert!(y[6].is_nan());
        gelu_all(&[-1e30, -100.0, -0.0, 100.0, 1e30], &mut y[..5]);
        assert_eq!(y[..5], [0.0, 0.0, 0.0, 100.0, 1e30]);
        gelu_grad_all(&[-1e30, -100.0, 100.0, 1e30], &mut y[..4]);
        assert_eq!(y[..4], [0.0, 0.0, 1.0, 1.0]);
        quick_gelu_all(&[-100.0, 100.0], &mut y[..2]);
        assert!(y[0].abs() < 1e-30 && y[1] == 100.0, "{y:?}");
    }
}
