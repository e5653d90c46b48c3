use std::{fmt, str::FromStr};

use hyper::Uri;

/// The default port.
const PORT: u16 = 80;

/// The address at which a shop answers HTTP: `http://host:port`, with nothing after it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HttpUrl(String);

/// What is wrong with the URL of a shop. Never quotes a part of the URL that may be a password.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HttpUrlError {
    /// The string is not of the form `http://host:port`.
    #[error("a shop is at http://host:port, such as http://127.0.0.1:8080")]
    Shape,
    /// The URL needs TLS.
    #[error("TLS is not supported: use http://host:port, behind a proxy that ends TLS")]
    Tls,
    /// The URL names a user, with or without a password.
    #[error("the URL must not contain a user or a password; a shop is at http://host:port")]
    User,
    /// The URL has a path or other text after the port.
    #[error("nothing may follow the port; a shop is at http://host:port")]
    Path,
}

impl FromStr for HttpUrl {
    type Err = HttpUrlError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.contains('@') {
            return Err(HttpUrlError::User);
        }
        let uri: Uri = text.parse().map_err(|_| HttpUrlError::Shape)?;
        match (uri.scheme_str(), uri.authority()) {
            (Some("https"), _) => Err(HttpUrlError::Tls),
            (Some("http"), Some(authority)) if !authority.host().is_empty() => {
                let has_port = authority.as_str().rsplit(']').next().is_some_and(|rest| rest.contains(':'));
                if has_port && authority.port_u16().is_none() {
                    return Err(HttpUrlError::Shape);
                }
                if !matches!(uri.path(), "" | "/") || uri.query().is_some() {
                    return Err(HttpUrlError::Path);
                }
                Ok(Self(format!("http://{authority}")))
            }
            _ => Err(HttpUrlError::Shape),
        }
    }
}

impl HttpUrl {
    /// The address to connect to, as `host:port`.
    pub fn address(&self) -> String {
        let authority = self.0.trim_start_matches("http://");
        let has_port = authority.rsplit(']').next().is_some_and(|rest| rest.contains(':'));
        if has_port { authority.to_owned() } else { format!("{authority}:{PORT}") }
    }
}

impl fmt::Display for HttpUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
