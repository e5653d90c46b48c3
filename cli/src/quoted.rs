//! Decides which parts of the command line an error may quote. No part that may be a password is quoted.

use clap::{builder::StyledStr, error::ContextValue};

/// Returns the text unchanged, or only its scheme if the rest may hold a password: before an `@`, among the parameters,
/// or after a second colon.
pub fn quoted(text: &str) -> String {
    let (scheme, rest) = text.split_once("://").unwrap_or(("", text));
    let is_port =
        |after: &str| after.split(['/', ',']).next().is_some_and(|port| port.bytes().all(|b| b.is_ascii_digit()));
    let has_secret = text.contains(['@', '?', '#'])
        || text.to_ascii_lowercase().contains("password")
        || (!scheme.is_empty() && rest.split(':').skip(1).any(|after| !is_port(after)));
    match scheme {
        _ if !has_secret => text.to_owned(),
        _ if is_scheme(scheme) => format!("{scheme}://…"),
        _ => "…".to_owned(),
    }
}

/// Returns whether the text can be a scheme. A word before a colon may be something else, such as a user name.
pub fn is_scheme(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphabetic())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || ['+', '-', '.'].contains(&c))
}

/// Removes every part that may be a password from an error of the command line.
pub fn without_passwords(mut error: clap::Error) -> clap::Error {
    let said: Vec<_> = error.context().map(|(kind, value)| (kind, hidden(value))).collect();
    for (kind, value) in said {
        error.insert(kind, value);
    }
    error
}

fn hidden(value: &ContextValue) -> ContextValue {
    let styled = |text: &StyledStr| {
        let plain = text.to_string();
        let quoted: Vec<_> = plain.split(' ').map(quoted).collect();
        let quoted = quoted.join(" ");
        if quoted == plain { text.clone() } else { StyledStr::from(quoted) }
    };
    match value {
        ContextValue::String(text) => ContextValue::String(quoted(text)),
        ContextValue::Strings(texts) => ContextValue::Strings(texts.iter().map(|text| quoted(text)).collect()),
        ContextValue::StyledStr(text) => ContextValue::StyledStr(styled(text)),
        ContextValue::StyledStrs(texts) => ContextValue::StyledStrs(texts.iter().map(styled).collect()),
        other => other.clone(),
    }
}

/// Parameters that may be shown. The command that continues an interrupted one needs them, and none of them is secret.
const SHOWN: [&str; 4] = ["schema", "pooled", "password_file", "password_env"];

/// Returns a URL without its password. Drops every parameter that is not in `SHOWN`, since any of those may be a
/// password. Returns only the scheme if the end of the password cannot be determined.
pub fn without_password(url: &str) -> String {
    let scheme = url.split(':').next().unwrap_or_default();
    let hidden = format!("{scheme}://…");
    let (shown, parameters) = url.split_at(url.find(['?', '#']).unwrap_or(url.len()));
    let Some((_, rest)) = shown.split_once("//") else { return hidden };
    // Splits at the last `@`, because an unencoded password may contain an `@`, and also a `?`.
    let (user, host) = match rest.rsplit_once('@') {
        _ if parameters.contains('@') => return hidden,
        Some((user, host)) => (user.split(':').next(), host),
        None => (None, rest),
    };
    let port = host.split('/').next().unwrap_or_default().rsplit(']').next().unwrap_or_default().split_once(':');
    if port.is_some_and(|(_, port)| !port.bytes().all(|b| b.is_ascii_digit())) {
        // The URL has a user and a password without a host.
        return hidden;
    }
    let user = user.map(|user| format!("{user}@")).unwrap_or_default();
    let parameters =
        parameters.strip_prefix('?').filter(|parameters| !parameters.contains(['@', '#', '?'])).unwrap_or_default();
    let is_shown = |pair: &&str| pair.split_once('=').is_some_and(|(name, _)| SHOWN.contains(&name));
    let query = parameters.split('&').filter(is_shown).collect::<Vec<_>>().join("&");
    let query = if query.is_empty() { query } else { format!("?{query}") };
    format!("{scheme}://{user}{host}{query}")
}
