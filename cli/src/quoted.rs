//! What an error may quote of what was typed: no password, wherever it stands.

use clap::{builder::StyledStr, error::ContextValue};

/// The text, or only its scheme where the rest may hold a password: in front of an `@`, among parameters, behind a second
/// colon.
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

/// Whether this can be a scheme at all, and not what stands in front of the colon of something else, such as a user's name.
pub fn is_scheme(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphabetic())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || ['+', '-', '.'].contains(&c))
}

/// An error of the command line, without what may be a password in it.
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

/// Parameters that are shown: a command that goes on elsewhere needs them, and none is a secret.
const SHOWN: [&str; 4] = ["schema", "pooled", "password_file", "password_env"];

/// A URL without its password. Drops all parameters but those of `SHOWN`: a password may be one of them. Where it cannot be told where
/// the password ends, nothing is shown but the scheme.
pub fn without_password(url: &str) -> String {
    let scheme = url.split(':').next().unwrap_or_default();
    let hidden = format!("{scheme}://…");
    let (shown, parameters) = url.split_at(url.find(['?', '#']).unwrap_or(url.len()));
    let Some((_, rest)) = shown.split_once("//") else { return hidden };
    // The last `@`: a password that was not encoded may hold one, and may hold a `?` too.
    let (user, host) = match rest.rsplit_once('@') {
        _ if parameters.contains('@') => return hidden,
        Some((user, host)) => (user.split(':').next(), host),
        None => (None, rest),
    };
    let port = host.split('/').next().unwrap_or_default().rsplit(']').next().unwrap_or_default().split_once(':');
    if port.is_some_and(|(_, port)| !port.bytes().all(|b| b.is_ascii_digit())) {
        // A user and a password without their host.
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
