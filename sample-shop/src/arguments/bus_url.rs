use std::{fmt, str::FromStr};

use super::quoted::is_scheme;

/// How services talk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BusUrl {
    /// Inside this process.
    Local,
    /// Over Kafka: its first brokers, each `host:port`.
    Kafka(Vec<String>),
}

/// What is wrong with a bus URL. Says nothing of what may be a password.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BusUrlError {
    /// No bus has this scheme.
    #[error("no bus has the scheme {0:?}; known are local:, kafka://host:port[,host:port]")]
    Scheme(String),
    /// Not even a scheme.
    #[error("it has no scheme; known are local:, kafka://host:port[,host:port]")]
    NoScheme,
    /// Something follows `local:`.
    #[error("local: takes nothing after it")]
    Local,
    /// A user, with or without a password.
    #[error("no user and no password may stand in it; a Kafka bus is kafka://host:port[,host:port]")]
    User,
    /// A broker is not `host:port`.
    #[error("{0:?} is not host:port; a Kafka bus is kafka://host:port[,host:port]")]
    Broker(String),
}

impl BusUrl {
    /// The scheme: `local` or `kafka`.
    pub fn scheme(&self) -> &'static str {
        match self {
            Self::Local => "local",
            Self::Kafka(_) => "kafka",
        }
    }
}

impl FromStr for BusUrl {
    type Err = BusUrlError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (scheme, rest) = text.split_once(':').ok_or(BusUrlError::NoScheme)?;
        match scheme {
            "local" if rest.is_empty() => Ok(Self::Local),
            "local" => Err(BusUrlError::Local),
            "kafka" if rest.contains('@') => Err(BusUrlError::User),
            "kafka" => {
                let brokers = rest.strip_prefix("//").ok_or_else(|| no_broker(rest))?;
                brokers.split(',').map(broker).collect::<Result<_, _>>().map(Self::Kafka)
            }
            other if is_scheme(other) => Err(BusUrlError::Scheme(other.to_owned())),
            _ => Err(BusUrlError::NoScheme),
        }
    }
}

/// Quotes the host, and the port if it is a number: it may be a password whose `@host` was forgotten.
fn no_broker(text: &str) -> BusUrlError {
    BusUrlError::Broker(match text.split_once(':') {
        Some((host, port)) if !port.bytes().all(|b| b.is_ascii_digit()) => format!("{host}:…"),
        _ => text.to_owned(),
    })
}

fn broker(text: &str) -> Result<String, BusUrlError> {
    match text.rsplit_once(':') {
        Some((host, port))
            if !host.is_empty()
                && !host.contains(['/', ' '])
                && port.bytes().all(|b| b.is_ascii_digit())
                && port.parse::<u16>().is_ok_and(|port| port > 0) =>
        {
            Ok(text.to_owned())
        }
        _ => Err(no_broker(text)),
    }
}

impl fmt::Display for BusUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Local => f.write_str("local:"),
            Self::Kafka(brokers) => write!(f, "kafka://{}", brokers.join(",")),
        }
    }
}
