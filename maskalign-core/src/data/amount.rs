//! Amounts as recipes write them: one number, or the least and the greatest.

use std::fmt;

use maskalign_registry::Refusal;
use schemars::{Schema, json_schema};
use serde::de::{Deserialize, Deserializer, Error, SeqAccess, Visitor};
use serde::ser::{Serialize, Serializer};
use serde_json::{Value, json};

/// An amount that a transform draws: `0.4`, which each transform reads in its own way, or `[low, high]`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Amount {
    /// One number.
    Number(f64),
    /// The least and the greatest value.
    Range(f64, f64),
}

/// What an amount may be: the least and the greatest value of a number, and of the ends of a range. An end that is
/// infinite bounds nothing.
#[derive(Clone, Copy)]
pub(crate) struct Limits {
    pub(crate) number: (f64, f64),
    pub(crate) ends: (f64, f64),
}

impl Amount {
    /// The range that is meant where one number is how far values lie from `center`.
    pub fn around(self, center: f64) -> (f64, f64) {
        match self {
            Amount::Number(distance) => (center - distance, center + distance),
            Amount::Range(low, high) => (low, high),
        }
    }

    /// The range that is meant where one number is the value itself.
    pub fn bounds(self) -> (f64, f64) {
        match self {
            Amount::Number(value) => (value, value),
            Amount::Range(low, high) => (low, high),
        }
    }

    /// Refuses what is outside of `limits`, what is no number, and ranges the wrong way round.
    pub(crate) fn check(self, option: &str, limits: Limits) -> Result<(), Refusal> {
        let inside = |value: f64, (least, most): (f64, f64)| value.is_finite() && least <= value && value <= most;
        match self {
            Amount::Number(value) if !inside(value, limits.number) => {
                Err(Refusal::new(option, format!("expected a number{}, found {value}", said(limits.number))))
            }
            Amount::Range(low, high) if !inside(low, limits.ends) || !inside(high, limits.ends) => Err(Refusal::new(
                option,
                format!("expected [low, high], each a number{}, found [{low}, {high}]", said(limits.ends)),
            )),
            Amount::Range(low, high) if low > high => {
                Err(Refusal::new(option, format!("expected the lower number first, found [{low}, {high}]"))
                    .help(format!("write [{high}, {low}]")))
            }
            Amount::Number(_) | Amount::Range(..) => Ok(()),
        }
    }
}

/// ` from 0 to 1`, ` of at least 0`, or nothing.
fn said((least, most): (f64, f64)) -> String {
    match (least.is_finite(), most.is_finite()) {
        (true, true) => format!(" from {least} to {most}"),
        (true, false) => format!(" of at least {least}"),
        (false, _) => String::new(),
    }
}

impl Limits {
    /// The schema of an option that is an [`Amount`] within these limits.
    pub(crate) fn schema(self) -> Schema {
        let bounded = |(least, most): (f64, f64)| -> Value {
            let mut number = json!({ "type": "number" });
            for (keyword, bound) in [("minimum", least), ("maximum", most)] {
                if bound.is_finite() {
                    number[keyword] = json!(bound);
                }
            }
            number
        };
        json_schema!({
            "anyOf": [
                bounded(self.number),
                { "type": "array", "items": bounded(self.ends), "minItems": 2, "maxItems": 2 }
            ]
        })
    }
}

impl<'de> Deserialize<'de> for Amount {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct AmountVisitor;

        impl<'de> Visitor<'de> for AmountVisitor {
            type Value = Amount;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number or [low, high]")
            }

            fn visit_f64<E: Error>(self, value: f64) -> Result<Amount, E> {
                Ok(Amount::Number(value))
            }

            fn visit_u64<E: Error>(self, value: u64) -> Result<Amount, E> {
                Ok(Amount::Number(value as f64))
            }

            fn visit_i64<E: Error>(self, value: i64) -> Result<Amount, E> {
                Ok(Amount::Number(value as f64))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Amount, A::Error> {
                let low = seq.next_element()?.ok_or_else(|| A::Error::invalid_length(0, &self))?;
                let high = seq.next_element()?.ok_or_else(|| A::Error::invalid_length(1, &self))?;
                if seq.next_element::<f64>()?.is_some() {
                    return Err(A::Error::invalid_length(3, &self));
                }
                Ok(Amount::Range(low, high))
            }
        }

        deserializer.deserialize_any(AmountVisitor)
    }
}

impl Serialize for Amount {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match *self {
            Amount::Number(value) => value.serialize(serializer),
            Amount::Range(low, high) => [low, high].serialize(serializer),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Amount, String> {
        serde_json::from_str(text).map_err(|error| error.to_string())
    }

    #[test]
    fn an_amount_is_one_number_or_the_ends_of_a_range() {
        assert_eq!(parse("0.4"), Ok(Amount::Number(0.4)));
        assert_eq!(parse("2"), Ok(Amount::Number(2.0)));
        assert_eq!(parse("[-1, 0.5]"), Ok(Amount::Range(-1.0, 0.5)));
        for amount in [Amount::Number(0.25), Amount::Range(0.1, 2.0)] {
            assert_eq!(parse(&serde_json::to_string(&amount).unwrap()), Ok(amount));
        }
        for text in ["\"0.4\"", "[1]", "[1, 2, 3]", "{}", "[1, \"a\"]", "true"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_number_is_a_distance_or_a_value_and_a_range_is_itself() {
        assert_eq!(Amount::Number(0.25).around(1.0), (0.75, 1.25));
        assert_eq!(Amount::Number(0.25).bounds(), (0.25, 0.25));
        for range in [Amount::Range(0.5, 2.0).around(1.0), Amount::Range(0.5, 2.0).bounds()] {
            assert_eq!(range, (0.5, 2.0));
        }
    }

    #[test]
    fn what_is_outside_or_the_wrong_way_round_is_refused_with_what_may_stand_there() {
        let limits = Limits { number: (0.0, 0.5), ends: (-0.5, 0.5) };
        let message = |amount: Amount| amount.check("hue", limits).unwrap_err().message;
        assert_eq!(message(Amount::Number(0.6)), "expected a number from 0 to 0.5, found 0.6");
        assert_eq!(message(Amount::Number(f64::NAN)), "expected a number from 0 to 0.5, found NaN");
        assert_eq!(
            message(Amount::Range(-0.7, 0.1)),
            "expected [low, high], each a number from -0.5 to 0.5, found [-0.7, 0.1]"
        );
        assert_eq!(message(Amount::Range(0.2, 0.1)), "expected the lower number first, found [0.2, 0.1]");
        assert!(Amount::Range(-0.5, 0.5).check("hue", limits).is_ok());
        let open = Limits { number: (0.0, f64::INFINITY), ends: (f64::NEG_INFINITY, f64::INFINITY) };
        assert!(Amount::Number(1e300).check("degrees", open).is_ok());
        assert!(Amount::Range(f64::NEG_INFINITY, 0.0).check("degrees", open).is_err());
        assert_eq!(
            Amount::Number(-1.0).check("degrees", open).unwrap_err().message,
            "expected a number of at least 0, found -1"
        );
    }
}
