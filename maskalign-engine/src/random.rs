//! Random streams keyed by what they are for.

use std::convert::Infallible;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng, TryRng};
use rand_distr::{Distribution, StandardNormal};

/// A random stream keyed by (seed, purpose, epoch, sample).
///
/// Two streams with the same key give the same numbers on every machine; streams with different keys are independent.
/// Nothing else matters: not the thread, the time, the batch or the order of arrival. A resumed, a repeated and a
/// differently batched run therefore draw the same crops and masks.
///
/// ```
/// # use maskalign_engine::random::Stream;
/// let mut crops = Stream::new(0, "augment", 3, 17);
/// let mut again = Stream::new(0, "augment", 3, 17);
/// assert_eq!(crops.uniform(), again.uniform());
/// ```
#[derive(Clone, Debug)]
pub struct Stream(ChaCha8Rng);

impl Stream {
    /// The stream of a key. `sample` is a dataset index, or 0 where the draw is not for one sample.
    pub fn new(seed: u64, purpose: &str, epoch: u64, sample: u64) -> Self {
        let mut key = blake3::Hasher::new();
        for part in [seed, epoch, sample] {
            key.update(&part.to_le_bytes());
        }
        key.update(purpose.as_bytes());
        Self(ChaCha8Rng::from_seed(*key.finalize().as_bytes()))
    }

    /// Uniform in [0, 1), a multiple of 2^-53.
    pub fn uniform(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
    }

    /// 32 bits.
    pub fn bits(&mut self) -> u32 {
        self.next_u32()
    }

    /// Uniform in [low, high]; `low` where both are equal.
    pub fn uniform_in(&mut self, low: f64, high: f64) -> f64 {
        low + (high - low) * self.uniform()
    }

    /// Uniform among 0, 1, ..., n - 1, without bias; 0 where `n` is 0.
    pub fn below(&mut self, n: usize) -> usize {
        let n = n as u64;
        // Lemire's method: the high half of a product, redrawn where the low half falls into the short remainder.
        let mut product = u128::from(self.next_u64()) * u128::from(n);
        if (product as u64) < n {
            let remainder = n.wrapping_neg() % n;
            while (product as u64) < remainder {
                product = u128::from(self.next_u64()) * u128::from(n);
            }
        }
        (product >> 64) as usize
    }

    /// Normally distributed with mean 0 and standard deviation 1.
    pub fn normal(&mut self) -> f64 {
        StandardNormal.sample(&mut self.0)
    }

    /// Shuffles the items uniformly.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            let chosen = self.below(last + 1);
            items.swap(last, chosen);
        }
    }

    /// A uniformly random permutation of 0, 1, ..., n - 1.
    pub fn permutation(&mut self, n: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..n).collect();
        self.shuffle(&mut order);
        order
    }
}

/// It never fails, which makes the stream an [`Rng`] that distributions can draw from.
impl TryRng for Stream {
    type Error = Infallible;

    fn try_next_u32(&mut self) -> Result<u32, Infallible> {
        self.0.try_next_u32()
    }

    fn try_next_u64(&mut self) -> Result<u64, Infallible> {
        self.0.try_next_u64()
    }

    fn try_fill_bytes(&mut self, bytes: &mut [u8]) -> Result<(), Infallible> {
        self.0.try_fill_bytes(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_of_the_key_counts() {
        let first = |seed, purpose, epoch, sample| Stream::new(seed, purpose, epoch, sample).next_u64();
        let base = first(1, "mask", 2, 3);
        assert_eq!(base, first(1, "mask", 2, 3));
        for other in [first(0, "mask", 2, 3), first(1, "augment", 2, 3), first(1, "mask", 3, 3), first(1, "mask", 2, 2)]
        {
            assert_ne!(base, other);
        }
    }

    #[test]
    fn a_recorded_stream_does_not_change_between_versions() {
        let mut stream = Stream::new(0, "shuffle", 0, 0);
        assert_eq!(stream.permutation(8), [7, 6, 0, 3, 1, 4, 5, 2]);
        assert_eq!(
            (stream.below(1000), stream.uniform(), stream.normal()),
            (266, 0.6120711094668256, 0.07852765045851694)
        );
    }

    #[test]
    fn below_is_uniform_and_stays_in_range() {
        let mut stream = Stream::new(7, "test", 0, 0);
        let mut counts = [0usize; 7];
        for _ in 0..70_000 {
            counts[stream.below(7)] += 1;
        }
        assert!(counts.iter().all(|&count| count.abs_diff(10_000) < 400), "{counts:?}");
        assert_eq!(stream.below(1), 0);
        assert_eq!(stream.below(0), 0);
    }

    #[test]
    fn a_permutation_holds_every_number_once() {
        let mut order = Stream::new(3, "test", 0, 0).permutation(1000);
        assert_ne!(order, (0..1000).collect::<Vec<_>>());
        order.sort_unstable();
        assert_eq!(order, (0..1000).collect::<Vec<_>>());
    }

    #[test]
    fn normal_has_mean_0_and_variance_1() {
        let mut stream = Stream::new(5, "test", 0, 0);
        let draws: Vec<f64> = (0..100_000).map(|_| stream.normal()).collect();
        let mean = draws.iter().sum::<f64>() / draws.len() as f64;
        let variance = draws.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / draws.len() as f64;
        assert!(mean.abs() < 0.02 && (variance - 1.0).abs() < 0.02, "{mean} {variance}");
    }
}
