//! The parts of the command line that an error may quote: never a password, wherever it stands.

use clap::{builder::StyledStr, error::ContextValue};

/// Returns the text, or only its scheme if the rest may hold a password: before an `@`, among parameters, or after a
/// second colon.
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

/// Returns whether the text can be a scheme, and not the part before the colon of another word, such as a user's name.
pub fn is_scheme(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphabetic())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || ['+', '-', '.'].contains(&c))
}

/// Returns an error of the command line without the parts that may be a password.
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

/// Parameters that are shown: the command that continues elsewhere needs them, and none of them is a secret.
const SHOWN: [&str; 4] = ["schema", "pooled", "password_file", "password_env"];

/// Returns a URL without its password. Drops all parameters but those in `SHOWN`, since a password may be one of them.
/// If the end of the password is not certain, only the scheme is shown.
pub fn without_password(url: &str) -> String {
    let scheme = url.split(':').next().unwrap_or_default();
    let hidden = format!("{scheme}://…");
    let (shown, parameters) = url.split_at(url.find(['?', '#']).unwrap_or(url.len()));
    let Some((_, rest)) = shown.split_once("//") else { return hidden };
    // Splits at the last `@`: a password that was not encoded may contain one, and may contain a `?` too.
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
