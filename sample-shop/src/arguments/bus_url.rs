use std::{fmt, str::FromStr};

use annals_cli::quoted::is_scheme;

/// The bus between the services.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BusUrl {
    /// Inside this process.
    Local,
    /// Over Kafka.
    #[cfg(feature = "kafka")]
    Kafka(annals_kafka::Settings),
}

/// What is wrong with a bus URL. Never quotes a part of the URL that may be a password.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BusUrlError {
    /// The scheme belongs to no bus.
    #[error("no bus has the scheme {0:?}; known are local:, kafka://host:port[,host:port]")]
    Scheme(String),
    /// The string has no scheme.
    #[error("the URL has no scheme; known are local:, kafka://host:port[,host:port]")]
    NoScheme,
    /// The URL has text after `local:`.
    #[error("nothing may follow local:")]
    Local,
    /// The Kafka settings in the URL are invalid.
    #[error("{0}")]
    Kafka(String),
    /// The bus needs a feature that this build does not have.
    #[cfg(not(feature = "kafka"))]
    #[error(
        "this sample-shop was built without Kafka; build it with the feature: cargo run --release -p sample-shop \
         --features kafka -- …"
    )]
    NoKafka,
}

impl BusUrl {
    /// The scheme: `local` or `kafka`.
    pub fn scheme(&self) -> &'static str {
        match self {
            Self::Local => "local",
            #[cfg(feature = "kafka")]
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
            #[cfg(not(feature = "kafka"))]
            "kafka" => Err(BusUrlError::NoKafka),
            #[cfg(feature = "kafka")]
            "kafka" => {
                text.parse().map(Self::Kafka).map_err(|error: annals::BusError| BusUrlError::Kafka(error.to_string()))
            }
            other if is_scheme(other) => Err(BusUrlError::Scheme(other.to_owned())),
            _ => Err(BusUrlError::NoScheme),
        }
    }
}

impl fmt::Display for BusUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Local => f.write_str("local:"),
            #[cfg(feature = "kafka")]
            Self::Kafka(settings) => settings.fmt(f),
        }
    }
}
