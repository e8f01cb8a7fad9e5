// Activations by number: 1 + the index in ACTIVATIONS of `backends/fusion.py`, or 0 for none.

enum { NO_ACTIVATION, GELU_NEW, GELU, RELU };

DEVICE float apply_activation(float x, int activation) {
    switch (activation) {
        case GELU_NEW:
            return 0.5f * x * (1.0f + tanhf(0.7978845608f * (x + 0.044715f * x * x * x)));
        case GELU: return 0.5f * x * (1.0f + erff(0.7071067812f * x));
        case RELU: return fmaxf(x, 0.0f);
        default: return x;
    }
}
