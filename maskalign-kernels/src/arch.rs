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

/// The set in use: the best available one, detected once. The environment variable
/// `MASKALIGN_ISA` (`scalar`, `neon`, `avx2`, `avx512`) can choose another available one, so that
/// tests reach every path; a value that is unknown or not available here is ignored.
pub fn isa() -> Isa {
    static ISA: OnceLock<Isa> = OnceLock::new();
    *ISA.get_or_init(|| {
        let wanted = std::env::var("MASKALIGN_ISA").ok();
        Isa::all_available()
            .find(|isa| wanted.as_deref() == Some(isa.name()))
            .or_else(|| Isa::all_available().next())
            .unwrap_or(Isa::Scalar)
    })
}
