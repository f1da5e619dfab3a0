//! Which instruction set the kernels run on, chosen once at run time.

use std::sync::OnceLock;

/// An instruction set that the kernels have code for, from the widest to the portable one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    /// Portable code, compiled for the target's baseline without fused multiply-add.
    Scalar,
    /// 128-bit NEON, the baseline of 64-bit Arm.
    Neon,
    /// 256-bit AVX2 with fused multiply-add.
    Avx2,
    /// 512-bit AVX-512 (F, BW, DQ, VL).
    Avx512,
}

impl Isa {
    /// The name that `MASKALIGN_ISA` and reports use.
    pub fn name(self) -> &'static str {
        match self {
            Isa::Scalar => "scalar",
            Isa::Neon => "neon",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
        }
    }

    /// Whether this machine can run it.
    pub fn available(self) -> bool {
        match self {
            Isa::Scalar => true,
            Isa::Neon => cfg!(target_arch = "aarch64"),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => {
                Isa::Avx2.available()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
            }
            #[cfg(not(target_arch = "x86_64"))]
            Isa::Avx2 | Isa::Avx512 => false,
        }
    }

    /// Every instruction set that this machine can run, the best first.
    pub fn all_available() -> impl Iterator<Item = Isa> {
        [Isa::Avx512, Isa::Avx2, Isa::Neon, Isa::Scalar].into_iter().filter(|isa| isa.available())
    }
}

/// `MASKALIGN_ISA` names a set that this machine, or this version, does not have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NoSuchIsa {
    wanted: String,
}

impl std::error::Error for NoSuchIsa {}

impl std::fmt::Display for NoSuchIsa {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let known: Vec<&str> = Isa::all_available().map(Isa::name).collect();
        let (wanted, known) = (&self.wanted, known.join(", "));
        write!(
            f,
            "`MASKALIGN_ISA={wanted}` names no instruction set of this machine: it has {known}; name one of these, or none"
        )
    }
}

/// The set that the environment variable `MASKALIGN_ISA` (`scalar`, `neon`, `avx2`, `avx512`) names, so that tests reach
/// every path and a run can go on as it began; the best one where it names none.
///
/// # Errors
/// It names one that is unknown or not available.
pub fn requested() -> Result<Isa, NoSuchIsa> {
    let wanted = std::env::var_os("MASKALIGN_ISA").filter(|wanted| !wanted.is_empty());
    named(wanted.map(|wanted| wanted.to_string_lossy().into_owned()))
}

fn named(wanted: Option<String>) -> Result<Isa, NoSuchIsa> {
    match wanted {
        None => Ok(Isa::all_available().next().unwrap_or(Isa::Scalar)),
        Some(wanted) => Isa::all_available().find(|isa| isa.name() == wanted).ok_or(NoSuchIsa { wanted }),
    }
}

/// The set in use, chosen once: the one that was [`requested`]. One that is not there is for whoever opens a device to
/// refuse; here it is the best one.
pub fn isa() -> Isa {
    static ISA: OnceLock<Isa> = OnceLock::new();
    *ISA.get_or_init(|| requested().or_else(|_| named(None)).unwrap_or(Isa::Scalar))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Tests that are told to run on a set run on it.
    #[test]
    fn the_set_that_was_asked_for_is_the_one_in_use() {
        assert_eq!(requested(), Ok(isa()));
    }

    #[test]
    fn a_set_that_is_not_there_is_refused_with_those_that_are() {
        for wanted in ["sse9", "AVX2", if cfg!(target_arch = "x86_64") { "neon" } else { "avx2" }] {
            let refusal = named(Some(wanted.into())).unwrap_err().to_string();
            assert!(refusal.contains(wanted) && refusal.contains("scalar"), "{refusal}");
        }
        assert_eq!(named(Some("scalar".into())), Ok(Isa::Scalar));
        assert_eq!(named(None).ok(), Isa::all_available().next());
    }
}
