//! What the payment service needs from a payment provider.

use annals::StepError;
use async_trait::async_trait;
use rust_decimal::Decimal;
use uuid::Uuid;

use crate::card::Card;

/// Why a provider did not move the money.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum ProviderError {
    /// The issuer of the card declined.
    #[error("declined: {0}")]
    Declined(String),
    /// The charge did not happen. The caller can try again.
    #[error("the provider is busy")]
    Busy,
    /// The outcome is unknown. The caller must try again with the same key.
    #[error("the provider did not answer in time")]
    TimedOut,
}

impl From<ProviderError> for StepError {
    fn from(error: ProviderError) -> Self {
        let reason = error.to_string();
        match error {
            ProviderError::Declined(_) => Self::Refused(reason),
            ProviderError::Busy => Self::Failed(reason),
            ProviderError::TimedOut => Self::Unknown(reason),
        }
    }
}

/// Moves money. Requests with the same key move the money once, however often they are repeated.
#[async_trait]
pub trait Provider: Send + Sync + 'static {
    async fn charge(&self, key: Uuid, order_id: &str, card: Card, amount: Decimal) -> Result<(), ProviderError>;
    /// Refunds at most the amount that was charged for `id`. If nothing was charged, refunds nothing.
    async fn refund(&self, key: Uuid, id: &str, amount: Decimal) -> Result<(), ProviderError>;
}
