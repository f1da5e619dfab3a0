//! The types of plain scalars.

use super::node::{Content, integer};

/// What the text of a plain scalar means in the core schema.
pub(crate) fn resolve_plain(text: &str) -> Content {
    match text {
        "" | "~" | "null" | "Null" | "NULL" => return Content::Null,
        "true" | "True" | "TRUE" => return Content::Bool(true),
        "false" | "False" | "FALSE" => return Content::Bool(false),
        ".nan" | ".NaN" | ".NAN" => return Content::Float(f64::NAN),
        _ => {}
    }
    let unsigned = text.strip_prefix(['-', '+']).unwrap_or(text);
    if matches!(unsigned, ".inf" | ".Inf" | ".INF") {
        let sign = if text.starts_with('-') { -1.0 } else { 1.0 };
        return Content::Float(sign * f64::INFINITY);
    }
    let digits = |text: &str, radix: u32| !text.is_empty() && text.chars().all(|c| c.is_digit(radix));
    let whole = |text: &str, radix: u32| match i128::from_str_radix(text, radix) {
        Ok(value) if integer(value).is_some() => Some(Content::Int(value)),
        _ => None,
    };
    for (prefix, radix) in [("0o", 8), ("0x", 16)] {
        if let Some(rest) = text.strip_prefix(prefix)
            && digits(rest, radix)
            && let Some(content) = whole(rest, radix)
        {
            return content;
        }
    }
    if digits(unsigned, 10) {
        if let Some(content) = whole(text, 10) {
            return content;
        }
        return text.parse().map_or_else(|_| Content::Str(text.to_owned()), Content::Float);
    }
    if is_float(unsigned)
        && let Ok(value) = text.parse()
    {
        return Content::Float(value);
    }
    Content::Str(text.to_owned())
}

/// Whether text without its sign is `(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?`.
fn is_float(unsigned: &str) -> bool {
    let (mantissa, exponent) = match unsigned.find(['e', 'E']) {
        Some(at) => (&unsigned[..at], Some(&unsigned[at + 1..])),
        None => (unsigned, None),
    };
    let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    let mantissa_holds = match mantissa.split_once('.') {
        Some((whole, fraction)) => digits(whole) && digits(fraction) && !(whole.is_empty() && fraction.is_empty()),
        None => !mantissa.is_empty() && digits(mantissa),
    };
    let exponent_holds = exponent.is_none_or(|exponent| {
        let exponent = exponent.strip_prefix(['-', '+']).unwrap_or(exponent);
        !exponent.is_empty() && digits(exponent)
    });
    mantissa_holds && exponent_holds
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::yaml::{Node, Origin, Typing};

    /// What the `yaml` package of yaml-language-server makes of the same texts in its 1.2 core
    /// schema.
    #[test]
    fn plain_scalars_follow_the_core_schema() {
        for (text, expected) in [
            ("", json!(null)),
            ("~", json!(null)),
            ("NULL", json!(null)),
            ("nULL", json!("nULL")),
            ("True", json!(true)),
            ("yes", json!("yes")),
            ("off", json!("off")),
            ("007", json!(7)),
            ("+12", json!(12)),
            ("-0", json!(0)),
            ("0o17", json!(15)),
            ("0x1F", json!(31)),
            ("-0x1F", json!("-0x1F")),
            ("1_000", json!("1_000")),
            ("18446744073709551615", json!(u64::MAX)),
            ("1e-3", json!(1e-3)),
            ("1.5e-4", json!(1.5e-4)),
            (".75", json!(0.75)),
            ("-.5", json!(-0.5)),
            ("3.", json!(3.0)),
            ("1.0E+2", json!(100.0)),
            (".", json!(".")),
            ("e5", json!("e5")),
            ("1e", json!("1e")),
            ("1.2.3", json!("1.2.3")),
            ("12:30", json!("12:30")),
            ("2020-01-01", json!("2020-01-01")),
        ] {
            let content = resolve_plain(text);
            let node = Node { content, origin: Origin::Default, typing: Typing::Text };
            assert_eq!(node.to_json(), expected, "{text:?}");
        }
    }
}
