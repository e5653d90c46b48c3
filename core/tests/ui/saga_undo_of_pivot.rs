use annals::{Saga, SagaState, saga::StepRequest};

#[derive(Clone, serde::Serialize, serde::Deserialize)]
struct Trip;
impl SagaState for Trip {}

fn ask(_: &Trip) -> StepRequest {
    unreachable!()
}

fn main() {
    Saga::named("trip").pivot("pay", ask).undo(ask);
}
