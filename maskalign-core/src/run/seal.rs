//! JSON files that know whether they are as they were written.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// The key of the checksum, which is over all else.
const KEY: &str = "blake3";

/// Why a text is not a sealed value.
pub(super) enum Broken {
    /// It has no checksum: an earlier version wrote it.
    Unsealed,
    /// What is wrong.
    Damaged(String),
}

/// A value as JSON with a checksum over its content; spaces and ends of lines are not under it.
pub(super) fn seal(value: &impl Serialize) -> serde_json::Result<String> {
    let mut value = serde_json::to_value(value)?;
    if let Value::Object(entries) = &mut value {
        let checksum = checksum(entries)?;
        entries.insert(KEY.into(), checksum.into());
    }
    Ok(serde_json::to_string_pretty(&value)? + "\n")
}

/// The value that was sealed.
pub(super) fn unseal<T: for<'de> Deserialize<'de>>(text: &str) -> Result<T, Broken> {
    let unread = |error: serde_json::Error| Broken::Damaged(format!("it does not parse: {error}"));
    let mut entries: Map<String, Value> = serde_json::from_str(text).map_err(unread)?;
    let Some(written) = entries.shift_remove(KEY) else {
        return Err(Broken::Unsealed);
    };
    if written != checksum(&entries).map_err(unread)? {
        return Err(Broken::Damaged("its content differs from its checksum".into()));
    }
    serde_json::from_value(Value::Object(entries)).map_err(unread)
}

fn checksum(entries: &Map<String, Value>) -> serde_json::Result<String> {
    Ok(blake3::hash(&serde_json::to_vec(entries)?).to_hex().to_string())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_is_changed_by_a_character_is_known() {
        let value = json!({ "step": 24, "loss": 0.1_f32, "tiny": -5e-324, "results": { "a": [1.0, null, "ü\n"] } });
        let text = seal(&value).unwrap();
        assert!(unseal::<Value>(&text).is_ok_and(|read| read == value));
        for (at, c) in text.char_indices().filter(|(_, c)| !c.is_whitespace()) {
            let other = if c == '7' { '8' } else { '7' };
            let changed = format!("{}{other}{}", &text[..at], &text[at + c.len_utf8()..]);
            match unseal::<Value>(&changed) {
                Err(Broken::Damaged(_)) => {}
                Err(Broken::Unsealed) => assert!(text[at..].len() < KEY.len() + 80, "only without its key: {changed}"),
                Ok(read) => assert_eq!(read, value, "another value: {changed}"),
            }
        }
        assert!(matches!(unseal::<Value>("{ \"step\": 24 }"), Err(Broken::Unsealed)));
        assert!(matches!(unseal::<Value>("[]"), Err(Broken::Damaged(_))));
    }
}
