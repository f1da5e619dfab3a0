//! Diagnostics as data, for scripts.

use serde_json::{Value, json};

use super::{Diagnostic, Place, SourceKind};

impl Diagnostic {
    /// The diagnostic as data: `code`, `severity`, `message`, `file`, `line`, `column`, `end` (line and column),
    /// `source_line`, `flag` (the text of the flag, where that is the source), `path`, `help`, `allowed`,
    /// `suggestions`, `related`.
    pub fn to_json(&self) -> Value {
        let position = |place: &Place| {
            let (line, column) = place.line_column();
            let (end_line, end_column) = place.source.line_column(place.span.end);
            let mut position = json!({
                "file": place.source.name(),
                "line": line,
                "column": column,
                "end": { "line": end_line, "column": end_column },
                "source_line": place.source.line(place.span.start),
            });
            // Flags share a name, so that nothing else tells them apart.
            if place.source.kind() == SourceKind::Flag {
                position["flag"] = json!(place.source.text());
            }
            position
        };
        let mut object = json!({
            "code": self.code,
            "severity": "error",
            "message": self.message,
            "path": self.path,
            "help": self.help,
            "allowed": self.allowed,
            "suggestions": self.suggestions,
        });
        if let (Value::Object(object), Some(Value::Object(position))) = (&mut object, self.place().map(position)) {
            object.extend(position);
        }
        let related: Vec<Value> = self
            .labels
            .iter()
            .skip(1)
            .map(|label| {
                let mut related = position(&label.place);
                related["message"] = json!(label.text);
                related
            })
            .collect();
        object["related"] = json!(related);
        object
    }
}
