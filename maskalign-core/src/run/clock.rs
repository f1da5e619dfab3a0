//! Times as the manifest and the names of run directories hold them.

use std::time::SystemTime;

use jiff::Timestamp;

/// A moment as RFC 3339 in UTC, to the second: `2023-06-18T09:30:00Z`. Moments that no calendar has count as 1970.
fn rfc3339(moment: SystemTime) -> String {
    utc(moment, "%FT%TZ")
}

/// This moment, for the manifest.
#[expect(clippy::disallowed_methods, reason = "the manifest says when a run was made; nothing is computed from it")]
pub(crate) fn this_moment() -> String {
    rfc3339(SystemTime::now())
}

/// A moment in UTC, in `strftime`'s notation.
pub(super) fn utc(moment: SystemTime, format: &str) -> String {
    Timestamp::try_from(moment).unwrap_or(Timestamp::UNIX_EPOCH).strftime(format).to_string()
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use super::*;

    #[test]
    fn moments_agree_with_gnu_date() {
        // date -u -d @N +%FT%TZ
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (1_687_080_600, "2023-06-18T09:30:00Z"),
            (1_735_689_599, "2024-12-31T23:59:59Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
        ] {
            assert_eq!(rfc3339(UNIX_EPOCH + Duration::from_secs(seconds)), text);
        }
    }
}
