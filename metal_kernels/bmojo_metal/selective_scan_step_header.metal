// SiLU of the causal convolution of one channel at one token: x is the token, past the TAPS - 1 before it.
template <int TAPS, bool HAS_BIAS, typename X, typename P, typename W, typename B>
inline float bmojo_conv_token(X x, P past, W weight, B bias, int channels, int channel) {
    float sum = HAS_BIAS ? float(bias[channel]) : 0.0f;
    for (int tap = 0; tap < TAPS; ++tap) {
        const float value = tap < TAPS - 1 ? float(past[tap * channels + channel]) : float(x[channel]);
        sum += value * float(weight[channel * TAPS + tap]);
    }
    return bmojo_silu(sum);
}
