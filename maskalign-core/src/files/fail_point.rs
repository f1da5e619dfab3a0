//! Places where a test build can be made to die, so that tests can show that a run survives it.
//!
//! With the feature `failpoints` the variable `MASKALIGN_FAIL=PLACE:COUNT` ends the process without any clean-up at the
//! COUNTth time that PLACE is reached. Places are `WHAT.write` (half of the file written), `WHAT.sync`, `WHAT.rename`
//! (before each) and `WHAT.renamed` for WHAT of `checkpoint`, `final`, `done`, `summary`, `manifest`, `recipe` and
//! `weights`; `metrics.append` (half of a line written); and what other modules add, such as `stage.between`.

/// Ends the process here if `MASKALIGN_FAIL` says so; without the feature `failpoints` it is nothing.
#[inline]
pub fn fail_point(what: &str, moment: &str) {
    fail_point_after(what, moment, || {});
}

/// As [`fail_point`], leaving the damage done by `damage` behind.
#[cfg(feature = "failpoints")]
pub(crate) fn fail_point_after(what: &str, moment: &str, damage: impl FnOnce()) {
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicI64, Ordering};

    static ARMED: OnceLock<Option<(String, AtomicI64)>> = OnceLock::new();
    let armed = ARMED.get_or_init(|| {
        let value = std::env::var("MASKALIGN_FAIL").ok()?;
        let (place, count) = value.rsplit_once(':').unwrap_or((&value, "1"));
        Some((place.to_owned(), AtomicI64::new(count.parse().unwrap_or(1))))
    });
    let Some((place, left)) = armed else { return };
    if place.split_once('.') == Some((what, moment)) && left.fetch_sub(1, Ordering::SeqCst) == 1 {
        damage();
        std::process::abort();
    }
}

/// As [`fail_point`], leaving the damage done by `damage` behind.
#[cfg(not(feature = "failpoints"))]
#[inline(always)]
pub(crate) fn fail_point_after(_what: &str, _moment: &str, _damage: impl FnOnce()) {}
