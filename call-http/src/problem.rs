//! Errors as `application/problem+json` (RFC 9457).

use std::fmt::Display;

use annals::ExecuteError;
use axum::{
    Json,
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

/// The error answer to a request. The type of the answer is `about:blank`: the status says which kind of problem
/// occurred, and the detail says how to solve the problem.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Problem {
    /// Always `about:blank`.
    #[serde(rename = "type")]
    pub kind: String,
    /// The name of the status.
    pub title: String,
    /// The status.
    pub status: u16,
    /// What is wrong, in a sentence.
    pub detail: String,
    /// The refusal of an aggregate, as its type serializes it, so that a client can tell refusals apart.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refusal: Option<Value>,
}

/// The number of seconds after which a client should retry a 503.
const RETRY_AFTER: HeaderValue = HeaderValue::from_static("1");

impl Problem {
    /// Returns a problem with this status.
    pub fn new(status: StatusCode, detail: impl Into<String>) -> Self {
        let title = status.canonical_reason().unwrap_or("Error").to_owned();
        Self { kind: "about:blank".into(), title, status: status.as_u16(), detail: detail.into(), refusal: None }
    }

    /// Returns a 503: the service cannot answer now, and the request had no effect. The client can repeat the request with
    /// the same key.
    pub fn unavailable(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, detail)
    }
}

/// The problem for a command that was not executed.
impl<R: std::error::Error> From<ExecuteError<R>> for Problem {
    fn from(error: ExecuteError<R>) -> Self {
        let detail = without_files(&error);
        match error {
            ExecuteError::Refused(refusal) => Self::new(StatusCode::UNPROCESSABLE_ENTITY, refusal.to_string()),
            ExecuteError::OtherVersion { .. } => Self::new(StatusCode::PRECONDITION_FAILED, detail),
            ExecuteError::Invalid(_) => Self::new(StatusCode::UNPROCESSABLE_ENTITY, detail),
            ExecuteError::Contended { .. } | ExecuteError::Overloaded { .. } | ExecuteError::Unavailable(_) => {
                Self::unavailable(detail)
            }
            _ => Self::new(StatusCode::INTERNAL_SERVER_ERROR, detail),
        }
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let mut response = (status, Json(self)).into_response();
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        if status == StatusCode::SERVICE_UNAVAILABLE {
            headers.insert(header::RETRY_AFTER, RETRY_AFTER);
        }
        response
    }
}

/// The text that replaces a file name.
const HIDDEN: &str = "…";
/// File extensions that mark a word as a file name, even without a folder.
const EXTENSIONS: [&str; 12] =
    [".db", ".db-wal", ".db-shm", ".db-journal", ".sqlite", ".sqlite3", ".csv", ".pem", ".crt", ".key", ".conf", ".rs"];

/// Formats an error of the store, the bus or the system without its file names, so that clients learn nothing about the
/// server's disk.
pub fn without_files(error: &impl Display) -> String {
    let is_end = |c: char| c.is_whitespace() || "\"'`()[]{}<>,;=".contains(c);
    let mut shown = String::new();
    let mut rest = &*error.to_string();
    while !rest.is_empty() {
        let word = &rest[..rest.find(is_end).unwrap_or(rest.len())];
        let name = word.trim_end_matches([':', '.']);
        if is_file(name, shown.ends_with(['"', '\''])) {
            shown += HIDDEN;
            shown += &word[name.len()..];
        } else {
            shown += word;
        }
        rest = &rest[word.len()..];
        let end = rest.chars().next().map_or(0, char::len_utf8);
        shown += &rest[..end];
        rest = &rest[end..];
    }
    shown
}

/// Returns whether a word names a file: an absolute or relative path, a path in quotes as PostgreSQL prints it, or a
/// name with a file extension.
fn is_file(word: &str, is_quoted: bool) -> bool {
    let is_drive =
        |word: &str| word.len() > 2 && word.as_bytes()[0].is_ascii_alphabetic() && word[1..].starts_with(":\\");
    if word.contains("://") {
        return false;
    }
    // Strips a position such as `:12:5`, which panics print after the file name.
    let name = word.trim_end_matches(|c: char| c == ':' || c.is_ascii_digit());
    let starts = ["/", "./", "../", "~/", "\\\\", "sqlite:", "file:"];
    word.len() > 1
        && (starts.iter().any(|start| word.starts_with(start))
            || is_drive(word)
            || is_quoted && word.contains('/')
            || EXTENSIONS.iter().any(|extension| name.ends_with(extension)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_file_names_are_hidden() {
        for (error, shown) in [
            ("the store is unavailable: /srv/shop.db: disk I/O error", "the store is unavailable: …: disk I/O error"),
            ("could not extend file \"base/5/16389\": No space left", "could not extend file \"…\": No space left"),
            ("could not open file '../pg_wal/00001'.", "could not open file '…'."),
            ("(code: 14) unable to open shop.db-wal", "(code: 14) unable to open …"),
            ("sqlite:shop.db is gone, see C:\\shop\\log.txt", "… is gone, see …"),
            ("panicked at sample-shop/src/order.rs:12:5: no", "panicked at …: no"),
            ("127.0.0.1:9092/bootstrap: Connect to ipv4#127.0.0.1:9092 failed", ""),
            ("order.relay/0 waits; and/or https://a/b.rs, 3/4 done / left", ""),
            ("stream order-1 is at version 2, not at 1", ""),
            ("", ""),
        ] {
            let expected = if shown.is_empty() { error } else { shown };
            assert_eq!(without_files(&error), expected);
        }
    }
}
