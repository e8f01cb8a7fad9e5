// Trains llm.c's CPU model on one batch. For each number n on the standard input it makes n updates
// and prints "step LOSS SECONDS" for each. Compile with -I and the folder of a clone of llm.c.
//
//     llm_c_steps MODEL BATCH B T LEARNING_RATE BETA1 BETA2 EPSILON WEIGHT_DECAY
//
// BATCH has the token ids [B, T] and the tokens after them [B, T], as int32.

#define TESTING  // leaves out llm.c's own main function
#include "train_gpt2.c"

int main(int argc, char *argv[]) {
    if (argc != 10) {
        fprintf(stderr, "expected 9 arguments\n");
        return 2;
    }
    int B = atoi(argv[3]), T = atoi(argv[4]);
    float rate = atof(argv[5]), beta1 = atof(argv[6]), beta2 = atof(argv[7]);
    float epsilon = atof(argv[8]), decay = atof(argv[9]);
    GPT2 model;
    gpt2_build_from_checkpoint(&model, argv[1]);
    int *ids = mallocCheck(2 * B * T * sizeof(int));
    FILE *file = fopenCheck(argv[2], "rb");
    freadCheck(ids, sizeof(int), 2 * B * T, file);
    fcloseCheck(file);
    printf("ready\n");
    fflush(stdout);
    int n, done = 0;
    while (scanf("%d", &n) == 1) {
        for (int i = 0; i < n; i++) {
            struct timespec start, end;
            clock_gettime(CLOCK_MONOTONIC, &start);
            gpt2_forward(&model, ids, ids + B * T, B, T);
            gpt2_zero_grad(&model);
            gpt2_backward(&model);
            gpt2_update(&model, rate, beta1, beta2, epsilon, decay, ++done);
            clock_gettime(CLOCK_MONOTONIC, &end);
            double seconds = end.tv_sec - start.tv_sec + 1e-9 * (end.tv_nsec - start.tv_nsec);
            printf("step %.6f %.6f\n", model.mean_loss, seconds);
        }
        fflush(stdout);
    }
    gpt2_free(&model);
    free(ids);
    return 0;
}
